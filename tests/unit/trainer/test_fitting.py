"""A GPU that has less left than was planned with."""

from __future__ import annotations

import pytest

from qlora_trainer.fitting import fitted, shrunk
from qlora_trainer.hardware import Hardware
from qlora_vram.gpus import GIB
from qlora_vram.planner import plan
from qlorajob.plan import Plan
from qlorajob.precision import NumberTypes
from qlorajob.spec import QLoRAJobSpec
from tests.support import models
from tests.unit.vram.workloads import spec

LLAMA_7B = models.facts("Llama-2-7B")
JOB = spec(resources={"gpuClass": "H100"}, training={"maxSequenceLength": 2048})


@pytest.fixture
def planned() -> Plan:
    found = plan(JOB, LLAMA_7B)
    assert isinstance(found, Plan)
    assert found.cache_weights
    return found


def test_what_fits_stays_as_it_was_planned(planned: Plan) -> None:
    assert shrunk(planned, JOB, LLAMA_7B, planned.predicted_peak_bytes) is planned


@pytest.mark.parametrize(
    ("left", "rows", "checkpointing"),
    [(40, 4, "none"), (25, 2, "none"), (15, 1, "none"), (9, 1, "full")],
)
def test_less_memory_gives_up_the_cache_then_rows_then_activations(
    planned: Plan, left: int, rows: int, checkpointing: str
) -> None:
    found = shrunk(planned, JOB, LLAMA_7B, left * GIB)
    assert (found.micro_batch_size, found.checkpointing, found.cache_weights) == (rows, checkpointing, False)
    assert found.predicted_peak_bytes <= left * GIB
    assert found.micro_batch_size * found.gradient_accumulation == JOB.training.global_batch_size
    assert (found.gpu_class, found.requests) == (planned.gpu_class, planned.requests)


def test_what_the_user_fixed_is_tried_as_it_is() -> None:
    """CUDA has the last word, and the operator knows larger classes."""
    fixed = {"maxSequenceLength": 2048, "microBatchSize": 4, "gradientCheckpointing": False}
    job: QLoRAJobSpec = spec(resources={"gpuClass": "H100"}, training=fixed)
    found = plan(job, LLAMA_7B)
    assert isinstance(found, Plan)
    assert shrunk(found, job, LLAMA_7B, 10 * GIB) is found


def test_without_a_gpu_there_is_nothing_to_look_at(planned: Plan) -> None:
    hardware = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
    assert fitted(planned, JOB, LLAMA_7B, hardware) is planned
    assert hardware.degradations == []
