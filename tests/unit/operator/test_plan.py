"""The planner: R2's table and verdicts, the exact global batch, and messages that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.config import OperatorConfig
from qlora_operator.plan import DoesNotFit, Shape, estimate, plan
from qlora_vram.gpus import GIB, SHIPPED, GpuClass, usable_bytes
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec
from tests.support.reports import TINY
from tests.unit.operator.world import qlorajob

LLAMA_7B = ModelFacts(
    model_type="llama", parameters=7_000_000_000, layers=32, hidden_size=4096, vocabulary=32000, weight_bytes=14 * 10**9
)
LLAMA_13B = ModelFacts(
    model_type="llama",
    parameters=13_000_000_000,
    layers=40,
    hidden_size=5120,
    vocabulary=32000,
    weight_bytes=26 * 10**9,
)
LLAMA_34B = ModelFacts(
    model_type="llama",
    parameters=34_000_000_000,
    layers=48,
    hidden_size=8192,
    vocabulary=32000,
    weight_bytes=68 * 10**9,
)
LLAMA_70B = ModelFacts(
    model_type="llama",
    parameters=70_000_000_000,
    layers=80,
    hidden_size=8192,
    vocabulary=32000,
    weight_bytes=140 * 10**9,
)


def spec(**fields: Any) -> QLoRAJobSpec:
    return qlorajob({"resources": {"gpuClass": "auto"}} | fields).spec


def on(gpu_class: str, length: int = 512, **training: Any) -> QLoRAJobSpec:
    return spec(resources={"gpuClass": gpu_class}, training={"maxSequenceLength": length} | training)


def planned(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B) -> Plan:
    found = plan(job, facts)
    assert isinstance(found, Plan), found
    return found


def refused(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B) -> DoesNotFit:
    found = plan(job, facts)
    assert isinstance(found, DoesNotFit), found
    return found


@pytest.mark.parametrize(
    ("facts", "gigabytes"), [(LLAMA_7B, 6), (LLAMA_13B, 10), (LLAMA_70B, 48)], ids=["7B", "13B", "70B"]
)
def test_the_estimate_is_r2s_table_at_one_row_of_512_tokens(facts: ModelFacts, gigabytes: int) -> None:
    assert sum(estimate(facts, on("auto"), Shape(1, "full")).values()) == gigabytes * 10**9


@pytest.mark.parametrize(
    ("gpu", "length", "facts"),
    [
        ("RTX-3060", 512, LLAMA_7B),
        ("RTX-4090", 2048, LLAMA_7B),
        ("RTX-4090", 2048, LLAMA_13B),
        ("A100-80GB", 4096, LLAMA_70B),
        ("T4", 512, LLAMA_7B),
    ],
)
def test_r2_says_it_fits(gpu: str, length: int, facts: ModelFacts) -> None:
    assert planned(on(gpu, length), facts).gpu_class == gpu


@pytest.mark.parametrize(("gpu", "length", "facts"), [("RTX-4090", 2048, LLAMA_34B), ("RTX-3060", 4096, LLAMA_13B)])
def test_r2_says_it_needs_optimisation(gpu: str, length: int, facts: ModelFacts) -> None:
    assert refused(on(gpu, length), facts).reason is Reason.DOES_NOT_FIT


def test_13b_on_12_gb_fits_at_512_tokens_as_r2s_own_table_says() -> None:
    """R2 advises against it ("needs more optimisation"), but its 10 GB leave 1.5 GB of the card."""
    assert planned(on("RTX-3060", 512, microBatchSize=1), LLAMA_13B).predicted_peak_bytes == 10 * 10**9


def test_a_7b_model_gets_the_smallest_class_that_holds_it() -> None:
    assert planned(on("auto")).gpu_class == "RTX-2080-Ti"


def test_a_70b_model_gets_a_large_one() -> None:
    found = planned(on("auto", 2048), LLAMA_70B)
    assert found.gpu_class in {"A100-80GB", "H100"}
    assert found.gpu_memory_mib >= 80_000


def test_the_reason_is_a_sentence_with_numbers() -> None:
    reason = planned(on("auto")).reason
    assert reason.startswith("7.0B parameters in 4 bit with ")
    assert "RTX-2080-Ti" in reason
    assert " GB" in reason


def test_a_given_micro_batch_is_kept() -> None:
    found = planned(on("A100-80GB", microBatchSize=2))
    assert (found.micro_batch_size, found.gradient_accumulation) == (2, 8)


def test_a_given_micro_batch_that_doesnt_fit_says_so() -> None:
    job = on("RTX-3060", 2048, microBatchSize=16)
    assert "leave training.microBatchSize (16) at auto" in refused(job).message


def test_gradient_checkpointing_is_on_by_default_on_a_gpu() -> None:
    assert planned(on("L4")).checkpointing == "full"


def test_gradient_checkpointing_can_be_turned_off() -> None:
    found = planned(on("A100-80GB", gradientCheckpointing=False))
    assert found.checkpointing == "none"


def test_an_old_gpu_has_no_bfloat16() -> None:
    assert planned(on("T4")).bf16 is False


def test_the_administrators_classes_replace_the_table() -> None:
    mine = (GpuClass(name="mine", memory_mib=24000),)
    found = plan(on("auto"), LLAMA_7B, mine)
    assert isinstance(found, Plan)
    assert found.gpu_class == "mine"


def test_an_unknown_class_names_the_known_ones() -> None:
    message = refused(on("G1000")).message
    assert "G1000" in message
    assert all(gpu.name in message for gpu in SHIPPED)


def test_several_gpus_are_refused_for_now() -> None:
    found = refused(spec(resources={"gpus": 2, "gpuClass": "auto"}))
    assert (found.reason, found.field) == (Reason.UNSUPPORTED, "resources.gpus")


def test_a_cpu_plan_asks_for_no_gpu_and_little() -> None:
    found = planned(on("cpu", 128, globalBatchSize=8), TINY)
    assert (found.gpus, found.gpu_class, found.gpu_memory_mib) == (0, "cpu", 0)
    assert found.micro_batch_size == 4
    assert found.checkpointing == "none"
    assert found.requests.cpu == "1"
    assert found.requests.memory == "4608Mi"


def test_a_cpu_plan_recomputes_where_memory_is_short() -> None:
    assert planned(on("cpu", 4096), TINY).checkpointing == "full"


def test_given_requests_are_kept() -> None:
    asked = {"cpu": "3", "memory": "20Gi", "ephemeralStorage": "50Gi"}
    found = planned(spec(resources={"gpuClass": "L4"} | asked)).requests
    assert (found.cpu, found.memory, found.ephemeral_storage) == ("3", "20Gi", "50Gi")


def test_weights_from_a_cache_need_no_local_disk() -> None:
    job = spec(model={"uri": "hf://o/m", "cacheClaim": "weights"}, resources={"gpuClass": "L4"})
    assert planned(job).requests.ephemeral_storage == "6Gi"


FACTS = st.builds(
    lambda parameters, layers, hidden, vocabulary: ModelFacts(
        model_type="llama",
        parameters=parameters,
        layers=layers,
        hidden_size=hidden,
        vocabulary=vocabulary,
        weight_bytes=2 * parameters,
    ),
    st.integers(0, 200_000_000_000),
    st.integers(0, 128),
    st.integers(0, 16384),
    st.integers(0, 256_000),
)
SPECS = st.builds(
    lambda gpu, batch, length, checkpointing: on(
        gpu, length, globalBatchSize=batch, gradientCheckpointing=checkpointing
    ),
    st.sampled_from(["auto", "cpu", "L4", "A100-80GB"]),
    st.integers(1, 512),
    st.integers(8, 16384),
    st.sampled_from(["auto", True, False]),
)


@given(SPECS, FACTS)
def test_the_global_batch_is_kept_exactly(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, Plan):
        assert found.micro_batch_size * found.gradient_accumulation == job.training.global_batch_size


@given(SPECS, FACTS)
def test_the_chosen_class_holds_the_predicted_peak(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, Plan) and found.gpus:
        gpu = next(gpu for gpu in SHIPPED if gpu.name == found.gpu_class)
        assert found.predicted_peak_bytes <= usable_bytes(gpu)
        assert found.predicted_peak_bytes == sum(found.breakdown.values())


@given(SPECS, FACTS, st.integers(1, 50_000_000_000))
def test_more_parameters_never_need_less(job: QLoRAJobSpec, facts: ModelFacts, more: int) -> None:
    larger = facts.model_copy(update={"parameters": facts.parameters + more})
    shape = Shape(1, "full")
    assert sum(estimate(larger, job, shape).values()) >= sum(estimate(facts, job, shape).values())
    if isinstance(plan(job, larger), Plan):
        assert isinstance(plan(job, facts), Plan)


@given(SPECS, FACTS)
def test_no_smaller_class_would_do(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, Plan) and job.resources.gpu_class == "auto":
        smaller = [gpu for gpu in SHIPPED if gpu.memory_mib < found.gpu_memory_mib]
        if smaller:
            assert isinstance(plan(job, facts, smaller), DoesNotFit)


@given(SPECS, FACTS)
def test_a_cpu_plan_always_exists(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    if job.resources.gpu_class == "cpu":
        found = plan(job, facts, config=OperatorConfig(cpu_memory_budget_bytes=GIB))
        assert isinstance(found, Plan)
