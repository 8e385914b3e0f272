"""Which GPU classes a cluster has, from label sets and ResourceSlices as NVIDIA's software writes them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.dra_gpus import slice_facts
from qlora_operator.fleet import Fleet, survey
from qlora_operator.node_gpus import node_facts
from qlora_vram.gpus import KNOWN, SHIPPED, GpuClass
from qlorajob.spec import ResourcesSpec
from tests.support import gpus
from tests.support.gpus import fleet

Json = dict[str, Any]

DEDICATED: Json = {"key": "dedicated", "value": "training", "effect": "NoSchedule"}


def classes(*objects: Json, values: tuple[GpuClass, ...] = ()) -> list[GpuClass]:
    return list(fleet(*objects, values=values).classes())


def names(*objects: Json, **resources: Any) -> list[str]:
    return [gpu.name for gpu in fleet(*objects).classes(ResourcesSpec.model_validate(resources))]


# Nodes with a device plugin

A100 = "NVIDIA-A100-SXM4-80GB"
H100_DEVICE = gpus.device("gpu-0", "NVIDIA H100 80GB HBM3", 81559, "9.0")


@pytest.mark.parametrize(
    ("raw", "name", "memory_mib", "capability", "resource", "per_node"),
    [
        (gpus.whole("n", "Tesla-T4"), "T4", 14910, 7.5, "nvidia.com/gpu", 1),
        (gpus.whole("n", "NVIDIA-A10", 4), "A10", 22500, 8.6, "nvidia.com/gpu", 4),
        (gpus.whole("n", "NVIDIA-L4", 8), "L4", 22487, 8.9, "nvidia.com/gpu", 8),
        (gpus.whole("n", A100, 8), "A100-80GB", 80994, 8.0, "nvidia.com/gpu", 8),
        (gpus.mig_single("n", A100, "1g.10gb", 9728, 7), "A100-80GB-1g.10gb", 9728, 8.0, "nvidia.com/gpu", 1),
        (
            gpus.mig_mixed("n", A100, {"3g.40gb": (40192, 2)}, gpus=0),
            *("A100-80GB-3g.40gb", 40192, 8.0, "nvidia.com/mig-3g.40gb", 1),
        ),
        # a profile that isn't in the table: memory as the label says it, less what the driver keeps
        (
            gpus.mig_mixed("n", A100, {"1g.12gb": (12000, 7)}, gpus=0),
            *("A100-80GB-1g.12gb", 11640, 8.0, "nvidia.com/mig-1g.12gb", 1),
        ),
        (gpus.shared("n", "Tesla-T4", 4, 1), "T4-shared-4", 3727, 7.5, "nvidia.com/gpu", 1),
    ],
)
def test_a_node_tells_its_class(
    raw: Json, name: str, memory_mib: int, capability: float, resource: str, per_node: int
) -> None:
    (gpu,) = classes(raw)
    assert (gpu.name, gpu.memory_mib, gpu.compute_capability) == (name, memory_mib, capability)
    assert (gpu.resource, gpu.gpus_per_node, gpu.device_class) == (resource, per_node, None)
    assert gpu.tflops > 0
    assert gpu.bandwidth_gbs > 0
    assert gpu.cost > 0


def test_a_mixed_node_has_its_slices_and_the_gpus_that_are_whole() -> None:
    slices = {"1g.10gb": (9728, 3), "3g.40gb": (40192, 1)}
    found = {gpu.name: gpu for gpu in classes(gpus.mig_mixed("n", A100, slices, gpus=7))}
    assert list(found) == ["A100-80GB-1g.10gb", "A100-80GB-3g.40gb", "A100-80GB"]
    assert found["A100-80GB"].gpus_per_node == 7


def test_a_node_whose_gpus_are_all_sliced_has_no_whole_one_though_its_labels_count_them() -> None:
    assert names(gpus.mig_mixed("n", A100, {"1g.10gb": (9728, 7)}, gpus=0)) == ["A100-80GB-1g.10gb"]


def test_slices_that_cannot_be_labelled_are_no_class() -> None:
    said = gpus.labels(f"{A100}-MIG-INVALID", 0, memory=0) | gpus.compute(A100)
    assert names(gpus.node("n", said, {}), gpus.whole("m", "Tesla-T4")) == ["T4"]


def test_a_renamed_shared_resource_is_asked_for_by_its_name() -> None:
    said = gpus.labels("Tesla-T4", replicas=2) | gpus.compute("Tesla-T4")
    (gpu,) = classes(gpus.node("n", said, {"nvidia.com/gpu": 0, "nvidia.com/gpu.shared": 2}))
    assert (gpu.name, gpu.resource, gpu.memory_mib) == ("T4-shared-2", "nvidia.com/gpu.shared", 7455)


def test_a_gpu_that_nobody_knows_gets_a_class_of_its_own() -> None:
    said = gpus.labels("NVIDIA-L99-Ultra", 2, memory=65536, **{"compute.major": 9, "compute.minor": 1})
    (gpu,) = classes(gpus.node("n", said, {"nvidia.com/gpu": 2}))
    assert (gpu.name, gpu.products, gpu.gpus_per_node) == ("L99-Ultra", ("NVIDIA-L99-Ultra",), 2)
    assert (gpu.memory_mib, gpu.compute_capability, gpu.bf16) == (63569, 9.1, True)
    h100 = next(known for known in KNOWN if known.name == "H100-PCIe")
    assert 0 < gpu.cost < h100.cost
    assert gpu.tflops > 0


def test_a_gpu_that_does_not_say_its_capability_is_taken_for_an_old_one() -> None:
    (gpu,) = classes(gpus.node("n", gpus.labels("GRID-X", memory=8192), {"nvidia.com/gpu": 1}))
    assert not gpu.bf16


def test_a_label_that_says_less_than_the_table_is_believed() -> None:
    (gpu,) = classes(gpus.node("n", gpus.labels("Tesla-T4", memory=8000), {"nvidia.com/gpu": 1}))
    assert gpu.memory_mib == 8000


def test_a_gpu_without_labels_is_no_class() -> None:
    assert fleet(gpus.node("n", {}, {"nvidia.com/gpu": 1})).known is False


def test_a_node_without_gpus_is_no_class() -> None:
    plain = gpus.node("n", {"node.kubernetes.io/instance-type": "m5"}, {})
    assert not node_facts(plain).has_gpus
    assert not fleet(plain).known


def test_a_node_that_is_not_ready_or_cordoned_still_shows_its_class() -> None:
    raw = gpus.whole("n", "NVIDIA-L4")
    raw["status"]["conditions"][0]["status"] = "False"
    raw["spec"] = {
        "unschedulable": True,
        "taints": [
            {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"},
        ],
    }
    assert names(raw) == ["L4"]


def test_a_device_plugin_that_is_not_up_yet_hides_nothing() -> None:
    assert names(gpus.node("n", gpus.labels("NVIDIA-L4") | gpus.compute("NVIDIA-L4"), {})) == ["L4"]


def test_nodes_of_a_class_are_one_class() -> None:
    odd = gpus.labels("NVIDIA-A100-PCIE-40GB", 2, memory=40000)
    (gpu,) = classes(
        gpus.whole("a", "NVIDIA-A100-SXM4-40GB", 8), gpus.node("b", odd, {"nvidia.com/gpu": 2}), gpus.node("c", {}, {})
    )
    assert (gpu.name, gpu.memory_mib, gpu.gpus_per_node) == ("A100-40GB", 40000, 8)
    assert set(gpu.products) == {"NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"}


def test_equal_slices_under_both_strategies_are_two_classes() -> None:
    found = classes(
        gpus.mig_mixed("a", A100, {"1g.10gb": (9728, 7)}, gpus=0), gpus.mig_single("b", A100, "1g.10gb", 9728, 7)
    )
    assert {gpu.name: gpu.resource for gpu in found} == {
        "A100-80GB-1g.10gb": "nvidia.com/mig-1g.10gb",
        "A100-80GB-1g.10gb-single": "nvidia.com/gpu",
    }


def test_a_gpu_that_the_trainer_cannot_use_is_not_offered() -> None:
    p100 = gpus.whole("n", "Tesla-P100-PCIE-16GB")
    assert names(p100, gpus.whole("m", "Tesla-T4")) == ["T4"]
    assert fleet(p100).known
    assert [gpu.name for gpu in survey([node_facts(p100)], [], minimum_capability=6.0).classes()] == ["P100"]


# What a job may use

POOLS = (
    gpus.whole("a", "Tesla-T4", 1, DEDICATED, pool="small"),
    gpus.whole("b", "NVIDIA-L4", 1, pool="small"),
    gpus.whole("c", A100, 1, {"key": "nvidia.com/gpu", "effect": "NoSchedule"}, pool="large"),
)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, ["L4", "A100-80GB"]),
        ({"nodeSelector": {"pool": "small"}}, ["L4"]),
        ({"nodeSelector": {"pool": "large"}}, ["A100-80GB"]),
        ({"nodeSelector": {"pool": "none"}}, []),
        ({"tolerations": [{"key": "dedicated", "operator": "Exists"}]}, ["T4", "L4", "A100-80GB"]),
        ({"tolerations": [{"operator": "Exists"}]}, ["T4", "L4", "A100-80GB"]),
        ({"tolerations": [{"key": "dedicated", "value": "training"}]}, ["T4", "L4", "A100-80GB"]),
        ({"tolerations": [{"key": "dedicated", "value": "serving"}]}, ["L4", "A100-80GB"]),
        ({"tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoExecute"}]}, ["L4", "A100-80GB"]),
    ],
)
def test_a_job_is_planned_for_nodes_that_it_may_use(resources: Json, expected: list[str]) -> None:
    assert names(*POOLS, **resources) == expected


# The administrator's values


def test_without_nodes_and_values_the_shipped_table_stands_in() -> None:
    empty = Fleet()
    assert empty.classes() == SHIPPED
    assert not any(gpu.is_slice or gpu.compute_capability < 7.5 for gpu in SHIPPED)
    auto = empty.slot("L4", 1, ResourcesSpec())
    assert auto
    assert not auto.exact


def test_a_pool_at_zero_is_a_class_beside_those_of_the_nodes() -> None:
    pool = GpuClass(name="H100", memory_mib=80995, node_labels={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"})
    small, large = classes(gpus.whole("n", "NVIDIA-L4"), values=(pool,))
    assert (small.name, large.name) == ("L4", "H100")
    assert (large.compute_capability, large.tflops, large.products) == (9.0, 989, ())


def test_values_win_over_what_nodes_tell_of_the_same_class() -> None:
    mine = GpuClass(name="L4", memory_mib=20000, cost=0.1)
    (gpu,) = classes(gpus.whole("n", "NVIDIA-L4", 2), values=(mine,))
    assert (gpu.memory_mib, gpu.cost, gpu.gpus_per_node) == (20000, 0.1, 2)
    assert gpu.products == ("NVIDIA-L4",)


def test_nodes_of_a_product_that_values_name_are_of_that_class() -> None:
    mine = GpuClass(name="cheap", memory_mib=22000, products=("NVIDIA-L4",), gpus_per_node=3)
    (gpu,) = classes(gpus.whole("n", "NVIDIA-L4", 2), values=(mine,))
    assert (gpu.name, gpu.gpus_per_node, gpu.compute_capability) == ("cheap", 3, 8.9)


# Dynamic resource allocation


def test_a_resource_slice_tells_a_class_that_is_claimed() -> None:
    other = gpus.device("gpu-1", "NVIDIA H100 80GB HBM3", 81559, "9.0")
    (gpu,) = classes(gpus.resource_slice("n", H100_DEVICE, other))
    assert (gpu.name, gpu.device_class, gpu.gpus_per_node) == ("H100", "gpu.nvidia.com", 2)
    assert gpu.selector == "device.attributes['gpu.nvidia.com'].productName == 'NVIDIA H100 80GB HBM3'"
    assert (gpu.memory_mib, gpu.compute_capability) == (80995, 9.0)


def test_a_resource_slice_tells_mig_slices() -> None:
    slices = [gpus.device(f"mig-{n}", "NVIDIA H100 80GB HBM3", 9984, "9.0", "1g.10gb") for n in range(3)]
    (gpu,) = classes(gpus.resource_slice("n", *slices))
    assert (gpu.name, gpu.device_class, gpu.gpus_per_node) == ("H100-1g.10gb", "mig.nvidia.com", 1)
    assert gpu.selector
    assert "profile == '1g.10gb'" in gpu.selector


def test_two_products_of_a_class_are_claimed_by_either_name() -> None:
    pcie = gpus.device("gpu-0", "NVIDIA A100 80GB PCIe", 81920, "8.0")
    sxm = gpus.device("gpu-0", "NVIDIA A100-SXM4-80GB", 81920, "8.0")
    (gpu,) = classes(gpus.resource_slice("a", pcie), gpus.resource_slice("b", sxm))
    assert gpu.name == "A100-80GB"
    assert gpu.selector
    assert [part.split("'")[-2] for part in gpu.selector.split(" || ")] == [
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-80GB",
    ]


def test_the_device_plugin_goes_before_the_claim_on_a_node_with_both() -> None:
    (gpu,) = classes(gpus.whole("n", "NVIDIA-H100-80GB-HBM3"), gpus.resource_slice("n", H100_DEVICE))
    assert gpu.device_class is None


def test_labels_alone_do_not_make_a_device_plugin_where_there_is_a_claim() -> None:
    product = "NVIDIA-H100-80GB-HBM3"
    labelled = gpus.node("n", gpus.labels(product) | gpus.compute(product), {}, pool="large")
    found = fleet(labelled, gpus.resource_slice("n", H100_DEVICE))
    assert [gpu.device_class for gpu in found.classes()] == ["gpu.nvidia.com"]
    assert found.classes(ResourcesSpec.model_validate({"nodeSelector": {"pool": "small"}})) == ()


def test_claimed_gpus_are_on_nodes_with_labels_and_taints_too() -> None:
    there = (gpus.node("n", {}, {}, DEDICATED, pool="large"), gpus.resource_slice("n", H100_DEVICE))
    tolerant = {"tolerations": [{"key": "dedicated", "operator": "Exists"}]}
    assert names(*there) == []
    assert names(*there, **tolerant) == ["H100"]
    assert names(*there, **tolerant, nodeSelector={"pool": "large"}) == ["H100"]
    assert names(*there, **tolerant, nodeSelector={"pool": "small"}) == []


def test_a_class_on_nodes_of_both_kinds_is_two_classes() -> None:
    found = classes(gpus.whole("a", "NVIDIA-H100-80GB-HBM3"), gpus.resource_slice("b", H100_DEVICE))
    assert {gpu.name: gpu.device_class for gpu in found} == {"H100": None, "H100-dra": "gpu.nvidia.com"}


def test_other_drivers_devices_are_none_of_ours() -> None:
    raw = gpus.resource_slice("n", H100_DEVICE)
    raw["spec"]["driver"] = "nic.example.com"
    assert slice_facts(raw) is None


# Any mixture

SAMPLES = (
    *POOLS,
    gpus.whole("d", "NVIDIA-H100-80GB-HBM3", 8),
    gpus.mig_mixed("e", A100, {"1g.10gb": (9728, 3), "3g.40gb": (40192, 1)}, gpus=1),
    gpus.mig_single("f", A100, "1g.10gb", 9728, 7),
    gpus.shared("g", "Tesla-T4", 2, 1),
    gpus.node("h", gpus.labels("Tesla-T4", replicas=2) | gpus.compute("Tesla-T4"), {"nvidia.com/gpu.shared": 2}),
    gpus.node("i", gpus.labels("NVIDIA-L99-Ultra", memory=65536), {"nvidia.com/gpu": 2}),
    gpus.resource_slice("j", H100_DEVICE, gpus.device("mig-0", "NVIDIA A100-SXM4-80GB", 9728, "8.0", "1g.10gb")),
    gpus.resource_slice("a", gpus.device("gpu-0", "Tesla T4", 15360, "7.5")),
)
VALUES = st.lists(
    st.sampled_from((GpuClass(name="H100", memory_mib=80000), GpuClass(name="pool", memory_mib=24000))),
    unique_by=lambda gpu: gpu.name,
)


@given(st.lists(st.sampled_from(SAMPLES), unique_by=lambda raw: (raw["kind"], raw["metadata"]["name"])), VALUES)
def test_each_name_is_one_class_that_a_pod_can_ask_for(raw: list[Json], values: list[GpuClass]) -> None:
    there = fleet(*raw, values=tuple(values))
    found = there.classes()
    assert len({gpu.name for gpu in found}) == len(found)
    assert {gpu.name for gpu in values} <= {gpu.name for gpu in found} or not there.known
    for gpu in found:
        slot = there.slot(gpu.name, 1, ResourcesSpec.model_validate({"tolerations": [{"operator": "Exists"}]}))
        assert slot
        assert slot.gpu == gpu
        assert slot.exact is there.known


@given(st.lists(st.sampled_from(SAMPLES), unique_by=lambda raw: (raw["kind"], raw["metadata"]["name"])))
def test_the_order_of_nodes_says_nothing(raw: list[Json]) -> None:
    def summary(objects: list[Json]) -> set[tuple[str, int, int]]:
        return {(gpu.name, gpu.memory_mib, gpu.gpus_per_node) for gpu in classes(*objects)}

    assert summary(raw) == summary(raw[::-1])
