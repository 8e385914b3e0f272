"""The operator on a cluster whose GPUs come and go: jobs wait for a GPU that holds them, and go on when it is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qlorajob.identity import prepare_key
from qlorajob.resource import parse
from tests.handlers.stage import Stage
from tests.support import gpus, models
from tests.support.nodes import Simulation
from tests.support.reports import TINY, prepare_report

ANY_GPU = {"gpuClass": "auto", "tolerations": [gpus.TOLERATION]}
H100 = gpus.device("gpu-0", "NVIDIA H100 80GB HBM3", 81559, "9.0")


@pytest.fixture
def simulation(stage: Stage) -> Iterator[Simulation]:
    """A node with an L4, and others that come and go; none is left after the test."""
    with Simulation(stage.cluster) as simulated:
        simulated.add(gpus.whole("sim-l4", "NVIDIA-L4", 1, gpus.SIMULATED))
        yield simulated


def prepare(stage: Stage, name: str, **report: Any) -> None:
    key = prepare_key(parse(stage.get("qlj", name)).spec)
    stage.finish(stage.pod(name, "prepare"), prepare_report(key, **report))


def stalled(stage: Stage, name: str, *words: str) -> None:
    """Wait until the job is stalled with these words."""

    def check() -> bool:
        condition = stage.condition(name, "Stalled")
        return condition.get("status") == "True" and all(word in condition["message"] for word in words)

    stage.until(check, f"{name} is stalled with {words}")


def template(stage: Stage, name: str) -> dict[str, Any]:
    """Wait for the training Job's pod template."""
    (job,) = stage.until(lambda: stage.jobs(name, "train"), f"{name} has a training Job")
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


def test_a_job_that_fits_nowhere_never_makes_a_gpu_pod_until_a_gpu_comes_that_holds_it(
    stage: Stage, simulation: Simulation
) -> None:
    stage.apply("waits", resources=ANY_GPU, training={"maxSequenceLength": 2048})
    prepare(stage, "waits", facts=models.facts("Llama-2-70B"))
    stalled(stage, "waits", "L4")
    assert stage.status("waits")["phase"] == "Pending"
    simulation.add(gpus.whole("sim-t4", "Tesla-T4", 1, gpus.SIMULATED))  # smaller still: it looks, and waits on
    assert stage.condition("waits", "Stalled")["reason"] == "DoesNotFit"
    assert stage.jobs("waits", "train") == []
    simulation.add(gpus.whole("sim-h100", "NVIDIA-H100-80GB-HBM3", 1, gpus.SIMULATED))
    affinity = template(stage, "waits")["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-H100-80GB-HBM3"]}
    ]
    assert stage.status("waits")["plan"]["gpuClass"] == "H100"
    assert "Stalled" not in {c["type"] for c in stage.status("waits")["conditions"] if c["status"] == "True"}


def test_an_unknown_class_is_told_which_ones_there_are_and_waited_for(stage: Stage, simulation: Simulation) -> None:
    stage.apply("named", resources=ANY_GPU | {"gpuClass": "A10"})
    prepare(stage, "named")
    stalled(stage, "named", "there is no GPU class A10", "L4")
    simulation.add(gpus.whole("sim-a10", "NVIDIA-A10", 1, gpus.SIMULATED))
    assert template(stage, "named")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_node_that_the_job_may_not_use_is_none(stage: Stage, simulation: Simulation) -> None:
    simulation.add(gpus.whole("sim-h100", "NVIDIA-H100-80GB-HBM3", 1, gpus.SIMULATED, pool="large"))
    stage.apply("elsewhere", resources={"gpuClass": "auto", "nodeSelector": {"pool": "none"}})
    prepare(stage, "elsewhere")
    stalled(stage, "elsewhere", "spec.resources.nodeSelector", "the cluster has L4, H100")
    stage.apply("untolerated", resources={"gpuClass": "auto", "nodeSelector": {"pool": "large"}})
    prepare(stage, "untolerated")
    stalled(stage, "untolerated", "resources.tolerations")
    assert stage.jobs("elsewhere", "train") + stage.jobs("untolerated", "train") == []


def test_a_claimed_gpu_gets_its_template_before_its_job(stage: Stage, simulation: Simulation) -> None:
    simulation.add(gpus.resource_slice("sim-dra", H100))
    stage.apply("claims", resources={"gpuClass": "H100"})
    prepare(stage, "claims", facts=TINY)
    (claim,) = template(stage, "claims")["resourceClaims"]
    made = stage.get("resourceclaimtemplate", claim["resourceClaimTemplateName"])
    assert made["metadata"]["ownerReferences"][0]["name"] == "claims"
    (request,) = made["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["deviceClassName"] == "gpu.nvidia.com"
    assert "NVIDIA H100 80GB HBM3" in request["exactly"]["selectors"][0]["cel"]["expression"]
