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
from qlora_vram.workload import Shape, Workload
from qlora_vram.workload import workload as workload_of
from tests.unit.vram.workloads import spec

RESULTS = Path(__file__).parents[3] / "docs/results/speed/results.json"
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
