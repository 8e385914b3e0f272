"""What is planned for training.backend: unsloth: never less than it took where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.models import SHAPES
from bench.train.cases import CASES
from qlora_vram.facts import model_facts
from qlora_vram.gpus import SHIPPED
from qlora_vram.memory import peak
from qlora_vram.observations import job_of
from qlora_vram.planner import plan
from qlora_vram.workload import Shape, Workload
from qlora_vram.workload import workload as workload_of
from qlorajob.plan import Plan
from tests.support import models
from tests.unit.vram.workloads import spec

RESULTS = Path(__file__).parents[3] / "docs/results/speed/h200/results.json"
H100 = next(gpu for gpu in SHIPPED if gpu.name == "H100")
MEASURED = {
    each["case"]: max(each["driver_gib"], each["reserved_gib"])
    for each in json.loads(RESULTS.read_text())
    if each["variant"] == "unsloth" and "driver_gib" in each
}
"""GiB by case. Every layer was checkpointed, in host memory: Unsloth's default."""


def _workload(name: str, backend: str) -> Workload:
    case = CASES[name]
    facts = model_facts(SHAPES[case.shape].config(case.length).to_dict())
    assert facts is not None
    asked = spec(
        quantization={"doubleQuant": case.double_quant},
        lora={"rank": case.rank, "dropout": case.dropout, "targetModules": SHAPES[case.shape].named(case.targets)},
        training={
            "backend": backend,
            "maxSequenceLength": case.length,
            "packing": False,
            "optimizer": case.optimizer,
            "globalBatchSize": case.rows,
        },
    )
    return workload_of(asked, facts, H100, Shape(case.rows, facts.layers, offload=True), 1)


@pytest.mark.parametrize("case", MEASURED)
def test_the_plan_is_not_below_what_was_measured(case: str) -> None:
    assert peak(_workload(case, "unsloth")).total >= MEASURED[case] * 2**30


def test_something_was_measured() -> None:
    assert MEASURED


def test_it_is_planned_as_the_plain_path_and_known_by_its_own_name() -> None:
    found, fast = _workload("r1", "unsloth"), _workload("r1", "hf")
    assert (found.engine, fast.engine) == ("plain", "fast")
    assert job_of(found, "H100", "image") != job_of(fast, "H100", "image")


@pytest.mark.parametrize(
    ("asked", "checkpointing", "in_host_memory"),
    [(True, "full", True), (False, "none", False), ("auto", "none", False)],
)
def test_checkpoints_wait_in_host_memory_as_unsloth_s_own_do(
    asked: bool | str, checkpointing: str, in_host_memory: bool
) -> None:
    """Recipe R2's alternative asks for "its own gradient checkpointing", whose host memory the pod must have."""
    job = spec(resources={"gpuClass": "H100"}, training={"backend": "unsloth", "gradientCheckpointing": asked})
    found = plan(job, models.facts("Llama-2-7B"))
    assert isinstance(found, Plan)
    assert (found.checkpointing, found.offload_checkpoints) == (checkpointing, in_host_memory)
