"""The table of GPU classes, and how others are told from it."""

from __future__ import annotations

import pytest

from qlora_vram.gpus import KNOWN, SHIPPED, GpuClass, by_size, usable_bytes
from qlora_vram.recognition import complete, product_label, recognize


def test_products_belong_to_one_class() -> None:
    products = [product for gpu in KNOWN for product in gpu.products]
    assert len(products) == len(set(products))


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_the_table_is_plausible(gpu: GpuClass) -> None:
    """Between the slowest and the fastest that there is, so that a slipped digit shows."""
    assert 4_000 < gpu.memory_mib < 300_000
    assert 0.1 < gpu.memory_mib / gpu.bandwidth_gbs < 130  # MiB per GB/s: how long to read it all, in ms
    assert gpu.tflops / gpu.bandwidth_gbs < 0.55
    assert 0.03 < gpu.cost < 20


def test_a_class_holds_less_than_the_card_has_and_not_much_less() -> None:
    for gpu in KNOWN:
        assert 0.95 < usable_bytes(gpu) / (gpu.memory_mib * 1024**2) < 1


def test_bfloat16_begins_with_ampere() -> None:
    assert {gpu.name for gpu in SHIPPED if not gpu.bf16} == {"RTX-2080-Ti", "T4", "Quadro-RTX-6000", "Quadro-RTX-8000"}


def test_the_smallest_comes_first_and_the_cheapest_among_equals() -> None:
    equal = [GpuClass(name=name, memory_mib=40000, cost=cost) for name, cost in (("b", 2), ("a", 2), ("c", 1))]
    assert [gpu.name for gpu in by_size([*equal, GpuClass(name="d", memory_mib=8000)])] == ["d", "c", "a", "b"]


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Tesla T4", "Tesla-T4"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA-RTX-6000-Ada-Generation"),
        ("Quadro (R) X", "Quadro-R-X"),
    ],
)
def test_names_become_labels_as_gpu_feature_discovery_makes_them(said: str, label: str) -> None:
    assert product_label(said) == label


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_every_product_is_recognized(gpu: GpuClass) -> None:
    for product in gpu.products:
        assert recognize(product, int(gpu.memory_mib / 0.98)) == gpu


def test_memory_that_nobody_knows_is_no_class() -> None:
    assert recognize("NVIDIA-L99", 0) is None


def test_what_is_said_of_a_class_stays() -> None:
    said = GpuClass(name="H100", memory_mib=70000, tflops=1, cost=2, gpus_per_node=3)
    found = complete(said)
    assert (found.memory_mib, found.tflops, found.cost, found.gpus_per_node) == (70000, 1, 2, 3)
    assert (found.bandwidth_gbs, found.compute_capability) == (3350, 9.0)


def test_a_card_nobody_knows_is_guessed_between_its_neighbours() -> None:
    found = complete(GpuClass(name="x", memory_mib=60000, compute_capability=8.0))
    low, high = (next(gpu for gpu in KNOWN if gpu.name == name) for name in ("A100-40GB", "A100-80GB"))
    assert low.cost < found.cost < high.cost
    assert low.tflops <= found.tflops <= high.tflops
    assert low.bandwidth_gbs <= found.bandwidth_gbs <= high.bandwidth_gbs
