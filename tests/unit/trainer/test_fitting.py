"""A GPU that has less left than was planned with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer import fitting
from qlora_trainer.fitting import fitted
from qlora_trainer.hardware import Hardware
from qlora_vram.gpus import GIB, KNOWN, MIB, USABLE_SHARE
from qlora_vram.planner import plan
from qlorajob.plan import ModelFacts, Plan
from qlorajob.precision import NumberTypes
from qlorajob.spec import QLoRAJobSpec
from tests.support import models
from tests.unit.vram.workloads import FACTS, spec

LLAMA_7B = models.facts("Llama-2-7B")
JOB = spec(resources={"gpuClass": "H100"}, training={"maxSequenceLength": 2048})


def planned_for(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B) -> Plan:
    found = plan(job, facts, KNOWN)
    assert isinstance(found, Plan)
    return found


def shrunk(planned: Plan, job: QLoRAJobSpec, facts: ModelFacts, left: int, host: int = 64 * GIB) -> Plan:
    return fitting.shrunk(planned, job, facts, left, host)


def holding(size: int) -> int:
    """Bytes of a GPU that a predicted peak of `size` may fill."""
    return int(size / USABLE_SHARE) + MIB


@pytest.fixture
def planned() -> Plan:
    found = planned_for(JOB)
    assert found.cache_weights
    return found


def test_what_fits_stays_as_it_was_planned(planned: Plan) -> None:
    assert shrunk(planned, JOB, LLAMA_7B, holding(planned.predicted_peak_bytes)) is planned
    assert shrunk(planned, JOB, LLAMA_7B, planned.predicted_peak_bytes) is not planned


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


def test_what_the_user_fixed_stays_and_is_tried_though_it_does_not_fit() -> None:
    """CUDA has the last word, and the operator knows larger classes."""
    fixed = {"maxSequenceLength": 2048, "microBatchSize": 4, "gradientCheckpointing": False}
    job = spec(resources={"gpuClass": "H100"}, training=fixed)
    found = shrunk(planned_for(job), job, LLAMA_7B, 10 * GIB)
    assert (found.micro_batch_size, found.checkpointing, found.cache_weights) == (4, "none", False)


@pytest.mark.parametrize("left", [0, GIB // 2, 3 * GIB])
def test_where_nothing_fits_the_least_is_tried(planned: Plan, left: int) -> None:
    found = shrunk(planned, JOB, LLAMA_7B, left)
    assert (found.micro_batch_size, found.checkpointing, found.offload_checkpoints) == (1, "full", True)


def test_checkpoints_go_to_host_memory_only_where_the_pod_has_room_for_them(planned: Plan) -> None:
    """A container beyond its memory is killed, and nobody would know why."""
    found = shrunk(planned, JOB, LLAMA_7B, 6 * GIB, host=4 * GIB)
    assert (found.micro_batch_size, found.checkpointing, found.offload_checkpoints) == (1, "full", False)


def test_what_earlier_runs_took_beyond_the_prediction_smaller_cuts_take_too(planned: Plan) -> None:
    """The trainer knows no observations, but it sees that the plan expects more than the memory model says."""
    rung = shrunk(planned, JOB, LLAMA_7B, 40 * GIB)
    left, expected = holding(rung.predicted_peak_bytes), planned.predicted_peak_bytes
    dearer, cheaper = (planned.model_copy(update={"predicted_peak_bytes": expected + off}) for off in (GIB, -GIB))
    assert shrunk(planned, JOB, LLAMA_7B, left) == shrunk(cheaper, JOB, LLAMA_7B, left) == rung
    assert shrunk(dearer, JOB, LLAMA_7B, left).micro_batch_size < rung.micro_batch_size
    assert shrunk(dearer, JOB, LLAMA_7B, left + 2 * GIB) == rung


@pytest.mark.parametrize(
    ("resources", "changes"),
    [
        ({"gpuClass": "H200-3g.71gb"}, {}),
        ({"gpuClass": "Quadro-RTX-8000"}, {}),
        ({"gpuClass": "H100"}, {"backend": "unsloth"}),
        ({"gpuClass": "H100"}, {"gradientCheckpointing": True}),
    ],
    ids=["slice", "without-bf16", "unsloth", "checkpointed"],
)
def test_any_class_and_backend_goes_down_to_what_fits(resources: dict[str, Any], changes: dict[str, Any]) -> None:
    job = spec(resources=resources, training={"maxSequenceLength": 2048, **changes})
    first = planned_for(job)
    found = shrunk(first, job, LLAMA_7B, 10 * GIB)
    assert found.predicted_peak_bytes <= 10 * GIB < first.predicted_peak_bytes
    assert (found.gpu_class, found.bf16, found.gpus) == (first.gpu_class, first.bf16, first.gpus)


def test_a_class_that_only_this_cluster_has_is_one_too(planned: Plan) -> None:
    own = planned.model_copy(update={"gpu_class": "team-a.shared_card"})
    found = shrunk(own, JOB, LLAMA_7B, 25 * GIB)
    assert (found.gpu_class, found.micro_batch_size) == ("team-a.shared_card", 2)


@given(FACTS, st.integers(1, 48), st.integers(64, 8192), st.floats(0, 1.2))
@settings(max_examples=60, deadline=None)
def test_the_ladder_ends_at_the_same_global_batch(facts: ModelFacts, batch: int, length: int, share: float) -> None:
    job = spec(resources={"gpuClass": "B300"}, training={"globalBatchSize": batch, "maxSequenceLength": length})
    first = plan(job, facts)
    if not isinstance(first, Plan):
        return
    found = shrunk(first, job, facts, int(share * first.predicted_peak_bytes))
    assert found.micro_batch_size * found.gradient_accumulation == batch
    assert found.predicted_peak_bytes <= first.predicted_peak_bytes
    assert (found.requests, found.gpu_class, found.strategy) == (first.requests, first.gpu_class, first.strategy)


def test_the_report_says_what_was_given_up(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware("cuda", NumberTypes("bfloat16", "bf16"), "paged_adamw_8bit")
    monkeypatch.setattr(fitting, "memory_left", lambda: 42 * GIB)
    fitted(planned, JOB, LLAMA_7B, hardware)
    (said,) = hardware.degradations
    assert said.startswith("this GPU has 45.1 GB left, and the plan takes ")
    assert said.endswith("trains with a micro batch of 4, checkpointing none, all weights in 4 bit only")


def test_without_a_gpu_there_is_nothing_to_look_at(planned: Plan) -> None:
    hardware = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
    assert fitted(planned, JOB, LLAMA_7B, hardware) is planned
    assert hardware.degradations == []
