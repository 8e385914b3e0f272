"""After out-of-memory: less and less memory at the same global batch, until there is nothing left to give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qlora_vram.gpus import SHIPPED, usable_bytes
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlora_vram.replan import replan
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec
from tests.support import models
from tests.unit.vram.workloads import FACTS, spec

LLAMA_7B = models.facts("Llama-2-7B")
USABLE = {gpu.name: usable_bytes(gpu) for gpu in SHIPPED}


def ladder(job: QLoRAJobSpec, facts: ModelFacts) -> Iterator[Plan | DoesNotFit]:
    """The first plan, and each that follows when the one before was out of memory."""
    found = plan(job, facts)
    yield found
    while isinstance(found, Plan):
        found = replan(found, job, facts)
        yield found


def rungs(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B) -> list[Plan]:
    return [found for found in ladder(job, facts) if isinstance(found, Plan)]


def shape(found: Plan) -> tuple[Any, ...]:
    return found.micro_batch_size, found.checkpointing, found.offload_checkpoints, found.gpu_class, found.cache_weights


def test_the_ladder_goes_from_the_micro_batch_to_a_bigger_class() -> None:
    """No cache; half the rows as long as there are some; then checkpointing; then host memory; then more GPU."""
    steps = rungs(spec(resources={"gpuClass": "auto"}, training={"maxSequenceLength": 2048, "microBatchSize": "auto"}))
    first = rungs(spec(resources={"gpuClass": "H100"}, training={"maxSequenceLength": 2048}))
    assert [shape(found)[:3] for found in first] == [
        (4, "none", False),
        (4, "none", False),
        (2, "none", False),
        (1, "none", False),
        (1, "full", False),
        (1, "full", True),
    ]
    assert [found.cache_weights for found in first] == [True, *[False] * 5]
    assert len({found.gpu_class for found in steps}) > 3


def test_what_the_user_fixed_stays() -> None:
    job = spec(
        resources={"gpuClass": "H100"},
        training={"maxSequenceLength": 2048, "microBatchSize": 4, "gradientCheckpointing": False},
    )
    assert [shape(found)[:4] for found in rungs(job)] == 2 * [(4, "none", False, "H100")]


def test_the_end_says_what_would_help() -> None:
    *_, last = ladder(spec(resources={"gpuClass": "T4"}), LLAMA_7B)
    assert isinstance(last, DoesNotFit)
    assert last.reason is Reason.OUT_OF_MEMORY
    assert "training.maxSequenceLength" in last.message


def test_a_rung_says_what_it_changes() -> None:
    _, second, third, *_ = rungs(spec(resources={"gpuClass": "H100"}, training={"maxSequenceLength": 2048}))
    said = "Out of GPU memory on H100 with 4 rows of 2048 tokens: goes on with"
    assert second.reason.startswith(f"{said} all weights in 4 bit only")
    assert third.reason.startswith(f"{said} a micro batch of 2")


def test_without_a_gpu_there_is_no_ladder() -> None:
    found = plan(spec(resources={"gpuClass": "cpu"}), LLAMA_7B)
    assert isinstance(found, Plan)
    assert isinstance(replan(found, spec(resources={"gpuClass": "cpu"}), LLAMA_7B), DoesNotFit)


def test_a_plan_of_a_class_that_is_gone_ends() -> None:
    found = rungs(spec(resources={"gpuClass": "H100"}))[0]
    assert isinstance(replan(found, spec(), LLAMA_7B, classes=SHIPPED[:1]), DoesNotFit)


JOBS = st.builds(
    lambda gpu, batch, length, checkpointing: spec(
        resources={"gpuClass": gpu},
        training={"globalBatchSize": batch, "maxSequenceLength": length, "gradientCheckpointing": checkpointing},
    ),
    st.sampled_from(["auto", "H100", "L4"]),
    st.integers(1, 48),
    st.integers(64, 8192),
    st.sampled_from(["auto", "auto", True, False]),
)


@given(JOBS, FACTS)
def test_the_ladder_ends_and_never_repeats(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    seen = rungs(job, facts)
    assert len(seen) < 64
    assert len({shape(found) for found in seen}) == len(seen)
    for before, after in pairwise(seen):
        bigger = USABLE[after.gpu_class] > USABLE[before.gpu_class]
        assert bigger or after.predicted_peak_bytes < before.predicted_peak_bytes
        assert after.micro_batch_size * after.gradient_accumulation == job.training.global_batch_size
