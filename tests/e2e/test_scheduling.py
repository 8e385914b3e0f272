"""The real scheduler puts each job's pod on a node of the class that the plan chose, on a fleet of simulated nodes.

Plans come from the planner for what the operator reads from the API server's own Nodes and ResourceSlices; the Jobs are
the operator's, but for their owner. Nodes aren't there, so pods are bound and never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Fleet
from qlora_operator.manifests import claim_template, train_job
from qlora_vram.planner import plan
from qlorajob.identity import prepare_key
from qlorajob.plan import Plan
from qlorajob.resource import QLoRAJob, parse
from tests.e2e.conftest import BUCKET, tiny_manifest, upload_large_model
from tests.support import gpus, models
from tests.support.live import Cluster, Namespace, eventually, merged
from tests.support.nodes import Simulation
from tests.support.reports import prepared

Json = dict[str, Any]

pytestmark = pytest.mark.cluster

T4, A10, L4 = "Tesla-T4", "NVIDIA-A10", "NVIDIA-L4"
A100_40, A100_80, H100 = "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3"
TAINT = gpus.SIMULATED
NODES = (
    gpus.whole("sim-t4", T4, 8, TAINT, pool="t4"),
    gpus.whole("sim-a10", A10, 8, TAINT, pool="a10"),
    gpus.whole("sim-l4", L4, 8, TAINT, {"key": "nvidia.com/gpu", "effect": "NoSchedule"}, pool="l4"),
    gpus.whole("sim-a100-40", A100_40, 8, TAINT, pool="a100-40"),
    gpus.whole("sim-a100-80", A100_80, 8, TAINT, pool="a100-80"),
    gpus.whole("sim-h100", H100, 8, TAINT, pool="h100"),
    gpus.mig_mixed("sim-mixed", A100_80, {"1g.10gb": (9728, 8), "3g.40gb": (40192, 8)}, 4, TAINT, pool="mixed"),
    gpus.mig_single("sim-single", A100_40, "2g.10gb", 9856, 8, TAINT, pool="single"),
    gpus.shared("sim-shared", T4, 2, 4, TAINT, pool="shared"),
)
SLICES = (
    gpus.resource_slice(
        "sim-claims",
        *(gpus.device(f"gpu-{number}", "NVIDIA B200", 183359, "10.0") for number in range(4)),
        *(gpus.device(f"mig-{number}", "NVIDIA H200", 16384, "9.0", "1g.18gb") for number in range(4)),
    ),
)
LAST = gpus.whole("sim-last", "NVIDIA-GeForce-RTX-3060", 1, {"key": "qlora.dev/last", "effect": "NoSchedule"})
"""The only GPU of its kind, and not for the cases below."""
CLAIMED_NODE = gpus.node("sim-claims", {}, {}, TAINT)
CLASSES_OF_NODES = {
    "sim-t4": {"T4"},
    "sim-a10": {"A10"},
    "sim-l4": {"L4"},
    "sim-a100-40": {"A100-40GB"},
    "sim-a100-80": {"A100-80GB"},
    "sim-h100": {"H100"},
    "sim-mixed": {"A100-80GB", "A100-80GB-1g.10gb", "A100-80GB-3g.40gb"},
    "sim-single": {"A100-40GB-2g.10gb"},
    "sim-shared": {"T4-shared-2"},
    "sim-last": {"RTX-3060"},
    "sim-claims": {"B200", "H200-1g.18gb"},
}
"""What may run where, written down by hand: the operator's reading of the labels must not judge itself."""


@dataclass(frozen=True)
class Case:
    """A model and what the manifest says beside it; `pool` restricts it to some of the nodes."""

    model: str
    length: int = 2048
    gpu: str = "auto"
    pool: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    tolerations: tuple[Json, ...] = (gpus.TOLERATION,)

    @property
    def name(self) -> str:
        """For the test's name and the objects'."""
        parts = (self.model, str(self.length), self.gpu, self.pool)
        return "-".join(part for part in parts if part and part != "auto").lower().replace(".", "-").replace("_", "-")


CASES = (
    # the mixed fleet: whatever is the best of all
    Case("TinyLlama-1.1B", 512),
    Case("Qwen2.5-3B"),
    Case("Llama-2-7B", 512),
    Case("Mistral-7B", 8192),
    Case("Llama-3-8B", 4096, training={"packing": True}),
    Case("Llama-2-13B"),
    Case("Qwen2.5-32B"),
    Case("CodeLlama-34B", 4096),
    Case("Llama-2-70B"),
    Case("Qwen2.5-72B", 4096),
    # fleets of one kind
    Case("Llama-2-7B", 512, pool="t4"),
    Case("Llama-2-7B", 512, pool="a10"),
    Case("Llama-2-13B", pool="l4"),
    Case("Llama-3-8B", pool="a100-40"),
    Case("Llama-2-70B", pool="a100-80"),
    Case("Llama-2-70B", pool="h100"),
    Case("TinyLlama-1.1B", 512, pool="mixed"),
    Case("Qwen2.5-32B", pool="mixed"),
    Case("TinyLlama-1.1B", 512, pool="single"),
    Case("TinyLlama-1.1B", 512, pool="shared"),
    # a class by name, where others would do as well
    Case("TinyLlama-1.1B", 512, gpu="H100"),
    Case("TinyLlama-1.1B", 512, gpu="A100-80GB-1g.10gb"),
    Case("Qwen2.5-3B", 512, gpu="A100-80GB-3g.40gb"),
    Case("Llama-2-7B", 512, gpu="A100-40GB"),
    # by ResourceClaim
    Case("Llama-2-13B", gpu="B200"),
    Case("TinyLlama-1.1B", 512, gpu="H200-1g.18gb"),
)


@pytest.fixture(scope="module")
def simulation(cluster: Cluster) -> Iterator[Simulation]:
    """The fleet. Device classes are those that the DRA driver's chart installs."""
    with Simulation(cluster) as simulated:
        simulated.add(*NODES, LAST, CLAIMED_NODE, *SLICES, gpus.device_class("gpu"), gpus.device_class("mig"))
        yield simulated


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, simulation: Simulation) -> Fleet:
    """What the operator makes of what the API server says."""
    found = json.loads(cluster.kubectl("get", "nodes,resourceslices", "-o", "json"))
    return gpus.fleet(*found["items"])


def qlorajob(namespace: Namespace, case: Case) -> QLoRAJob:
    resources = {"gpuClass": case.gpu, "tolerations": list(case.tolerations)}
    spec = {
        "training": {"maxSequenceLength": case.length, "maxSteps": None, "globalBatchSize": 16} | case.training,
        "resources": resources | ({"nodeSelector": {"pool": case.pool}} if case.pool else {}),
    }
    raw = tiny_manifest(namespace, case.name[:63], spec)
    return parse(merged(raw, {"metadata": {"namespace": namespace.name, "uid": f"uid-of-{case.name}"}}))


def objects(namespace: Namespace, fleet: Fleet, case: Case) -> tuple[Plan, list[Json]]:
    """The plan, and what the operator would create for it: the claim's template where there is one, then the Job."""
    job = qlorajob(namespace, case)
    facts = models.facts(case.model)
    planned = plan(job.spec, facts, fleet.classes(job.spec.resources))
    assert isinstance(planned, Plan), planned
    slot = fleet.slot(planned.gpu_class, planned.gpus, job.spec.resources)
    found = prepared(prepare_key(job.spec), "0123456789abcdef", facts=facts)
    train = train_job(job, found, planned, 1, OperatorConfig(trainer_image="qlora/none:none"), slot)
    made = [manifest for manifest in (claim_template(job, slot), train) if manifest]
    for manifest in made:
        del manifest["metadata"]["ownerReferences"]  # to a QLoRAJob that isn't there: they'd be collected as garbage
    return planned, made


def create(namespace: Namespace, manifests: list[Json]) -> None:
    items = {"apiVersion": "v1", "kind": "List", "items": manifests}
    namespace.kubectl("create", "-f", "-", input_text=json.dumps(items))


def nodes_of_pods(namespace: Namespace) -> dict[str, str]:
    """QLoRAJob → node of its training pod; "" where it has none, and the scheduler has said so."""
    found = {}
    for pod in namespace.get("pods", "-l", "qlora.dev/step=train")["items"]:
        reasons = {condition.get("reason") for condition in pod["status"].get("conditions", ())}
        if pod["spec"].get("nodeName") or "Unschedulable" in reasons:
            found[pod["metadata"]["labels"]["qlora.dev/job"]] = pod["spec"].get("nodeName", "")
    return found


@pytest.fixture(scope="module")
def placed(namespace: Namespace, fleet: Fleet) -> Iterator[dict[str, tuple[Plan, str]]]:
    """Every case's Job at once: its plan, and the node that the scheduler chose."""
    planned = {case.name: objects(namespace, fleet, case) for case in CASES}
    create(namespace, [manifest for _, made in planned.values() for manifest in made])
    eventually(lambda: planned.keys() <= nodes_of_pods(namespace).keys(), 120, "the scheduler has seen every pod")
    nodes = nodes_of_pods(namespace)
    yield {name: (found, nodes[name]) for name, (found, _) in planned.items()}
    namespace.kubectl("delete", "jobs", "--all", "--wait=false")
    namespace.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pod_lands_on_the_planned_class(placed: dict[str, tuple[Plan, str]], case: Case) -> None:
    planned, node = placed[case.name]
    on_own_node = node == "qlora-node" and planned.gpu_class == "L4"
    assert on_own_node or planned.gpu_class in CLASSES_OF_NODES.get(node, ()), (planned.gpu_class, node)
    if case.pool:
        assert node == f"sim-{case.pool}"
    if case.gpu != "auto":
        assert planned.gpu_class == case.gpu


def test_the_cases_reach_every_kind_of_gpu(placed: dict[str, tuple[Plan, str]]) -> None:
    """Otherwise a plan that always says the same would do."""
    reached = {planned.gpu_class for planned, _ in placed.values()}
    assert reached == {name for names in CLASSES_OF_NODES.values() for name in names} - {"RTX-3060"}


def test_a_pod_waits_for_its_class_though_larger_gpus_are_free(namespace: Namespace, fleet: Fleet) -> None:
    case = Case("TinyLlama-1.1B", 512, gpu="RTX-3060", tolerations=({"operator": "Exists"},))
    first, second = (objects(namespace, fleet, replace(case, length=length))[1] for length in (128, 256))
    names = [made[0]["metadata"]["labels"]["qlora.dev/job"] for made in (first, second)]
    create(namespace, first)
    assert eventually(lambda: nodes_of_pods(namespace).get(names[0]), 60, "the first has a node") == "sim-last"
    create(namespace, second)
    eventually(lambda: names[1] in nodes_of_pods(namespace), 60, "the scheduler has seen the second")
    assert nodes_of_pods(namespace)[names[1]] == ""
    namespace.kubectl("delete", "job", first[0]["metadata"]["name"], "--cascade=orphan")
    namespace.kubectl("delete", "pods", "-l", f"qlora.dev/job={names[0]}", "--force", "--grace-period=0")
    assert eventually(lambda: nodes_of_pods(namespace)[names[1]], 60, "the second has a node") == "sim-last"
    namespace.kubectl("delete", "job", second[0]["metadata"]["name"], "--wait=false")


def test_the_installed_operator_places_a_large_model(
    namespace: Namespace, simulation: Simulation, s3: Any, tiny_inputs: Path
) -> None:
    """Everything is real but node and weights: prepare reads a 70B model's config.json, and the operator plans."""
    vocabulary = json.loads((tiny_inputs / "config.json").read_text())["vocab_size"]  # it comes with that tokenizer
    upload_large_model(s3, tiny_inputs, "large-model", models.CONFIGS["Llama-2-70B"] | {"vocab_size": vocabulary})
    spec = {
        "model": {"uri": f"s3://{BUCKET}/large-model"},
        "training": {"maxSequenceLength": 512},
        "resources": {"gpuClass": "auto", "tolerations": [gpus.TOLERATION]},
    }
    namespace.apply(tiny_manifest(namespace, "large", spec))
    namespace.wait_for("large", "{.status.phase}=Queued")
    node = eventually(lambda: nodes_of_pods(namespace).get("large"), 60, "the pod has a node")
    planned = namespace.status("large")["plan"]
    assert planned["gpuClass"] in CLASSES_OF_NODES[node]
    assert planned["predictedPeakBytes"] > 30 * 10**9
    namespace.kubectl("delete", "qlj", "large")
