"""The planner: the cheapest class that holds the job, R2's verdicts, the exact global batch, and advice that works."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_vram import cuts
from qlora_vram.changes import with_field
from qlora_vram.cuts import Option
from qlora_vram.gpus import GIB, KNOWN, SHIPPED, GpuClass, usable_bytes
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlora_vram.requests import Defaults, merge_requests
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec
from tests.support import models
from tests.support.reports import TINY
from tests.unit.vram.workloads import FACTS, spec

LLAMA_7B, LLAMA_13B, LLAMA_70B = (models.facts(f"Llama-2-{size}B") for size in (7, 13, 70))
LLAMA_34B = models.facts("CodeLlama-34B")


def on(gpu_class: str, length: int = 512, **training: Any) -> QLoRAJobSpec:
    return spec(resources={"gpuClass": gpu_class}, training={"maxSequenceLength": length} | training)


def planned(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B, **options: Any) -> Plan:
    found = plan(job, facts, **options)
    assert isinstance(found, Plan), found
    return found


def refused(job: QLoRAJobSpec, facts: ModelFacts = LLAMA_7B, **options: Any) -> DoesNotFit:
    found = plan(job, facts, **options)
    assert isinstance(found, DoesNotFit), found
    return found


# R2's GPU advice: micro batch, length → verdict. The numbers say something else twice, below.


def verdict(found: Plan | DoesNotFit) -> str:
    """In R2's words: what fits only with checkpoints in host memory, or with a smaller micro batch, is optimised."""
    return "fits" if isinstance(found, Plan) and not found.offload_checkpoints else "needs optimisation"


ADVICE = [
    pytest.param("RTX-3060", 1, 512, LLAMA_7B, "fits", id="3060-7B"),
    pytest.param("RTX-4090", 4, 2048, LLAMA_7B, "fits", id="4090-7B"),
    pytest.param("RTX-4090", 4, 2048, LLAMA_13B, "fits", id="4090-13B"),
    pytest.param("RTX-4090", 4, 2048, LLAMA_34B, "needs optimisation", id="4090-34B"),
]


@pytest.mark.parametrize(("gpu", "rows", "length", "facts", "said"), ADVICE)
def test_the_planner_comes_to_r2s_verdicts(gpu: str, rows: int, length: int, facts: ModelFacts, said: str) -> None:
    assert verdict(plan(on(gpu, length, microBatchSize=rows, globalBatchSize=16), facts)) == said


def test_70b_on_80_gb_fits_at_r2s_setting_with_checkpoints_in_host_memory() -> None:
    """R2 says it fits. Its 8 rows of 4096 tokens have checkpoints of 43 GB beside weights of 36 GB."""
    assert planned(on("A100-80GB", 4096, microBatchSize=8), LLAMA_70B).offload_checkpoints
    assert verdict(plan(on("A100-80GB", 4096), LLAMA_70B)) == "fits"


def test_13b_on_12_gb_fits_at_r2s_setting_as_r2s_own_table_says() -> None:
    """R2 advises against it ("needs more optimisation"); its table has 10 GB, and the card 12."""
    found = planned(on("RTX-3060", 512, microBatchSize=1), LLAMA_13B)
    assert found.predicted_peak_bytes <= usable_bytes(next(gpu for gpu in SHIPPED if gpu.name == "RTX-3060"))


def test_34b_on_24_gb_fits_once_optimised() -> None:
    """Which is what the planner does when it's left to choose: one row at a time."""
    found = planned(on("RTX-4090", 2048), LLAMA_34B)
    assert (found.micro_batch_size, found.checkpointing != "none") == (1, True)


def test_easy_is_without_checkpointing() -> None:
    assert planned(on("RTX-4090", 2048, microBatchSize=2), LLAMA_7B).checkpointing == "none"


# Weights in 16 bit too


@pytest.mark.parametrize(
    ("gpu", "facts", "cached"),
    [
        pytest.param("H100", LLAMA_7B, True, id="room-for-14-GB-more"),
        pytest.param("L4", LLAMA_7B, False, id="too-little-room"),
        pytest.param("H100", LLAMA_70B, False, id="too-large"),
        pytest.param("Quadro-RTX-8000", LLAMA_7B, False, id="no-fast-path"),
    ],
)
def test_free_memory_spares_dequantization(gpu: str, facts: ModelFacts, cached: bool) -> None:
    found = planned(on(gpu), facts)
    assert found.cache_weights is cached
    assert ("weights in 16 bit too" in found.reason) is cached
    assert (found.breakdown.get("weightCache", 0) > 2 * 0.95 * facts.quantized_parameters) is cached


def test_a_cache_that_gains_nothing_to_speak_of_is_not_made() -> None:
    """A product of so many tokens takes a hundred times as long as the weight's dequantization."""
    assert not planned(on("B200", 16384, microBatchSize=4), LLAMA_7B).cache_weights


@given(st.integers(8_000, 60_000))
def test_a_cache_leaves_a_tenth_of_the_memory_free(mib: int) -> None:
    gpu = GpuClass(name="some", memory_mib=mib, tflops=100, bandwidth_gbs=400)
    found = planned(on("auto"), classes=[gpu])
    assert not found.cache_weights or found.predicted_peak_bytes <= 0.9 * usable_bytes(gpu)


# Which class


def test_a_7b_model_gets_the_cheapest_class_that_holds_it() -> None:
    found = planned(on("auto"))
    chosen = next(gpu for gpu in SHIPPED if gpu.name == found.gpu_class)
    assert chosen.cost == min(gpu.cost for gpu in SHIPPED)
    assert "is the cheapest class that holds the job" in found.reason


def test_of_equally_cheap_classes_the_smallest_is_taken() -> None:
    sizes = {"large": 40_000, "small": 20_000, "tiny": 1_100}
    classes = [GpuClass(name=name, memory_mib=size) for name, size in sizes.items()]
    assert planned(on("auto"), classes=classes).gpu_class == "small"


def test_a_dearer_class_is_taken_only_where_cheaper_ones_are_too_small() -> None:
    classes = [
        GpuClass(name="cheap", memory_mib=20_000, cost=1),
        GpuClass(name="dear", memory_mib=16_000, cost=2),
        GpuClass(name="large", memory_mib=80_000, cost=3),
    ]
    assert planned(on("auto"), classes=classes).gpu_class == "cheap"
    assert planned(on("auto"), LLAMA_70B, classes=classes).gpu_class == "large"


def test_several_gpus_come_after_all_single_ones() -> None:
    cheap, dear = (GpuClass(name=name, memory_mib=20_000, cost=cost) for name, cost in (("cheap", 1), ("dear", 5)))
    order = sorted([Option(cheap, 2, "ddp"), Option(dear), Option(cheap)], key=lambda option: option.order)
    assert order == [Option(cheap), Option(dear), Option(cheap, 2, "ddp")]


def test_an_unknown_class_names_the_known_ones() -> None:
    message = refused(on("G1000")).message
    assert "G1000" in message
    assert all(gpu.name in message for gpu in SHIPPED)
    assert len(message) <= 1024


def test_an_old_gpu_has_no_bfloat16() -> None:
    assert planned(on("T4")).bf16 is False
    assert planned(on("L4")).bf16 is True


def test_several_gpus_are_refused_for_now() -> None:
    found = refused(spec(resources={"gpus": 2}))
    assert (found.reason, found.field) == (Reason.UNSUPPORTED, "resources.gpus")


# Which cut


def test_a_roomy_gpu_recomputes_nothing() -> None:
    found = planned(on("H100", 2048))
    assert (found.checkpointing, found.checkpointed_layers) == ("none", 0)


def test_a_tight_gpu_recomputes_as_few_layers_as_it_must() -> None:
    job = on("A100-40GB", 2048, microBatchSize=8)
    found = planned(job)
    assert found.checkpointing == "partial"
    assert 0 < found.checkpointed_layers < 32
    room = usable_bytes(next(gpu for gpu in SHIPPED if gpu.name == "A100-40GB")) - found.predicted_peak_bytes
    assert room < 2 * GIB


def test_checkpoints_leave_the_gpu_only_if_they_must() -> None:
    assert not planned(on("L4", 2048)).offload_checkpoints
    assert planned(on("L4", 90112)).offload_checkpoints


@pytest.mark.parametrize(("asked", "said"), [(True, "full"), (False, "none")])
def test_what_the_user_says_of_checkpointing_counts(asked: bool, said: str) -> None:
    assert planned(on("A100-80GB", 2048, gradientCheckpointing=asked)).checkpointing == said


def test_a_given_micro_batch_is_kept() -> None:
    found = planned(on("A100-80GB", microBatchSize=2))
    assert (found.micro_batch_size, found.gradient_accumulation) == (2, 8)


@pytest.mark.parametrize("batch", [1, 7, 15, 18, 30, 100])
def test_any_divisor_of_the_global_batch_will_do(batch: int) -> None:
    found = planned(on("H100", 128, globalBatchSize=batch))
    assert found.micro_batch_size * found.gradient_accumulation == batch


def test_more_memory_never_trains_slower() -> None:
    speeds = []
    for memory in (12_000, 16_000, 24_000, 40_000, 80_000):
        gpu = GpuClass(name="g", memory_mib=memory, tflops=300, bandwidth_gbs=1500, compute_capability=8.0)
        speeds.append(planned(on("auto", 2048), classes=[gpu]).predicted_tokens_per_second)
    assert all(after >= 0.97 * before for before, after in pairwise(speeds))


def test_the_reason_is_a_sentence_with_numbers() -> None:
    reason = planned(on("L4")).reason
    assert reason.startswith("6.7B parameters in 4 bit with ")
    assert "L4 (22.9 GB usable) holds that" in reason
    assert " tokens/s" in reason


# Nothing fits


def test_a_refusal_says_by_how_much_and_what_would_do() -> None:
    found = refused(on("T4", 2048), LLAMA_70B)
    assert found.reason is Reason.DOES_NOT_FIT
    assert "T4 has 15.2 GB usable" in found.message
    assert [suggestion.field for suggestion in found.suggestions] == ["resources.gpuClass"]


def test_the_nearest_length_is_named() -> None:
    job = on("RTX-3060", 4096, gradientCheckpointing=False)
    suggestions = {suggestion.field: suggestion.value for suggestion in refused(job).suggestions}
    assert suggestions["training.gradientCheckpointing"] == "auto"
    longer = with_field(job, "training.maxSequenceLength", suggestions["training.maxSequenceLength"] + 64)
    assert isinstance(plan(longer, LLAMA_7B), DoesNotFit)


def test_a_rank_that_is_too_high_is_named() -> None:
    job = spec(resources={"gpuClass": "RTX-3060"}, lora={"rank": 512}, training={"maxSequenceLength": 512})
    suggestions = {suggestion.field: suggestion.value for suggestion in refused(job).suggestions}
    assert suggestions["lora.rank"] in (64, 128)


def test_a_cluster_without_gpus_is_told_so() -> None:
    assert "no GPU" in refused(on("auto"), classes=[]).message


# No GPU


def test_a_cpu_plan_asks_for_no_gpu_and_little() -> None:
    found = planned(on("cpu", 128, globalBatchSize=8), TINY)
    assert (found.gpus, found.gpu_class, found.gpu_memory_mib) == (0, "cpu", 0)
    assert (found.micro_batch_size, found.checkpointing) == (4, "none")
    assert found.requests.cpu == "1"
    assert found.requests.memory in ("4608Mi", "5Gi")


def test_a_cpu_plan_recomputes_where_memory_is_short() -> None:
    found = planned(on("cpu", 4096), TINY)
    assert (found.checkpointing, found.checkpointed_layers) == ("full", 30)


# Requests


def test_given_requests_are_kept() -> None:
    asked = {"cpu": "3", "memory": "20Gi", "ephemeralStorage": "50Gi"}
    found = planned(spec(resources={"gpuClass": "L4"} | asked)).requests
    assert (found.cpu, found.memory, found.ephemeral_storage) == ("3", "20Gi", "50Gi")


def test_weights_from_a_cache_need_no_local_disk() -> None:
    without, cached = (
        planned(spec(model={"uri": "hf://o/m"} | claim, resources={"gpuClass": "L4"})).requests.ephemeral_storage
        for claim in ({}, {"cacheClaim": "weights"})
    )
    assert (without, cached) == ("23040Mi", "7Gi")


def to_merge(facts: ModelFacts, **sections: dict[str, Any]) -> tuple[int, int]:
    """Memory and disk that merging asks for, in MiB."""
    found = merge_requests(spec(**{"merge": {"enabled": True}} | sections), facts, Defaults())
    return _mebibytes(found.memory), _mebibytes(found.ephemeral_storage)


def _mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * (1024 if quantity.endswith("Gi") else 1)


GGUF = {"enabled": True, "gguf": {"quantization": "q8_0"}}


def test_merging_takes_little_memory_whatever_the_model() -> None:
    assert to_merge(TINY)[0] <= 3 * 1024
    assert to_merge(LLAMA_7B)[0] <= 5 * 1024
    assert to_merge(LLAMA_70B)[0] <= 8 * 1024


def test_merging_has_room_for_the_download_and_one_file() -> None:
    _, disk = to_merge(LLAMA_70B)
    _, cached = to_merge(LLAMA_70B, model={"uri": "hf://o/m", "cacheClaim": "weights"})
    download = (LLAMA_70B.weight_bytes or 2 * LLAMA_70B.parameters) / 2**20
    assert disk - cached >= download
    assert 5e9 / 2**20 < cached < 12 * 1024


def test_an_export_takes_its_two_files_on_disk() -> None:
    (_, without), (_, exported) = to_merge(LLAMA_7B), to_merge(LLAMA_7B, merge=GGUF)
    assert exported - without >= 3 * LLAMA_7B.parameters / 2**20


@given(FACTS, st.sampled_from([1, 2, 7]), st.sampled_from(["bfloat16", "float32"]), st.booleans(), st.integers(1, 256))
def test_merging_a_larger_model_never_asks_for_less(
    facts: ModelFacts, times: int, dtype: str, exports: bool, rank: int
) -> None:
    wider = facts.model_copy(
        update={
            "linears": tuple(each.model_copy(update={"outputs": each.outputs * times}) for each in facts.linears),
            "parameters": facts.parameters * times,
            "embedding_parameters": facts.embedding_parameters * times,
            "head_parameters": facts.head_parameters * times,
            "weight_bytes": facts.weight_bytes * times,
        }
    )
    asked = {"lora": {"rank": rank}, "merge": (GGUF if exports else {"enabled": True}) | {"dtype": dtype}}
    less, more = to_merge(facts, **asked), to_merge(wider, **asked)
    assert less[0] <= more[0]
    assert less[1] <= more[1]
    plain = to_merge(facts)
    assert plain[0] <= to_merge(facts, lora={"rank": 512})[0]
    assert plain[1] <= to_merge(facts, merge=GGUF)[1]


def test_a_merged_model_that_is_to_answer_is_held_in_memory_whole() -> None:
    (silent, _), (answers, disk) = to_merge(LLAMA_7B), to_merge(LLAMA_7B, evaluation={"prompts": ["Hello"]})
    weights = 2 * LLAMA_7B.parameters / 2**20
    assert silent < weights < answers
    assert disk > 2 * weights


def test_an_export_takes_another_process_to_merge() -> None:
    assert to_merge(LLAMA_7B, merge=GGUF)[0] - to_merge(LLAMA_7B)[0] == 2 * 1024


# Several GPUs, once the trainer can


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "TRAINER_STRATEGIES", ("single", "ddp", "fsdp"))


@pytest.mark.usefixtures("several")
def test_several_gpus_share_a_model_that_one_cannot_hold() -> None:
    t4 = next(gpu for gpu in SHIPPED if gpu.name == "T4")
    found = planned(on("auto"), LLAMA_70B, classes=[t4])
    assert (found.strategy, found.gpu_class) == ("fsdp", "T4")
    assert 1 < found.gpus <= t4.gpus_per_node
    assert found.micro_batch_size * found.gradient_accumulation * found.gpus == 16


@pytest.mark.usefixtures("several")
def test_one_gpu_is_enough_where_one_holds_the_job() -> None:
    assert planned(on("auto")).gpus == 1


@pytest.mark.usefixtures("several")
def test_the_users_number_of_gpus_is_kept() -> None:
    found = planned(spec(resources={"gpus": 4, "gpuClass": "A100-80GB"}))
    assert (found.gpus, found.strategy) == (4, "ddp")


@pytest.mark.usefixtures("several")
def test_more_gpus_are_advised_where_the_user_forbade_them() -> None:
    found = refused(spec(resources={"gpus": 1, "gpuClass": "T4"}, training={"maxSequenceLength": 512}), LLAMA_70B)
    assert "resources.gpus" in [suggestion.field for suggestion in found.suggestions]


# Properties

JOBS = st.builds(
    lambda gpu, batch, rows, length, checkpointing, rank, packing: spec(
        resources={"gpuClass": gpu},
        lora={"rank": rank},
        training={
            "globalBatchSize": batch * rows,
            "microBatchSize": rows if rows > 1 else "auto",
            "maxSequenceLength": length,
            "gradientCheckpointing": checkpointing,
            "packing": packing,
        },
    ),
    st.sampled_from(["auto", "auto", "T4", "L4", "A100-80GB"]),
    st.integers(1, 64),
    st.integers(1, 4),
    st.integers(8, 16384),
    st.sampled_from(["auto", "auto", True, False]),
    st.sampled_from([4, 16, 64, 256]),
    st.booleans(),
)


@given(JOBS, FACTS)
def test_the_global_batch_is_kept_exactly(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, Plan):
        assert found.micro_batch_size * found.gradient_accumulation * found.gpus == job.training.global_batch_size


@given(JOBS, FACTS)
def test_the_chosen_plan_fits_and_adds_up(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, Plan):
        gpu = next(gpu for gpu in SHIPPED if gpu.name == found.gpu_class)
        assert found.predicted_peak_bytes <= usable_bytes(gpu)
        assert found.predicted_peak_bytes == sum(found.breakdown.values())
        assert found.checkpointed_layers <= facts.layers


@given(JOBS, FACTS)
def test_no_cheaper_class_would_do_and_no_smaller_one_of_its_price(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts, KNOWN)
    if isinstance(found, Plan):
        chosen = next(gpu for gpu in KNOWN if gpu.name == found.gpu_class)
        better = [gpu for gpu in KNOWN if (gpu.cost, gpu.memory_mib) < (chosen.cost, chosen.memory_mib)]
        if job.resources.gpu_class == "auto" and better:
            assert isinstance(plan(job, facts, better), DoesNotFit)


@given(JOBS, FACTS)
def test_every_suggestion_works(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(job, facts)
    if isinstance(found, DoesNotFit):
        assert len(found.message) <= 1024
        for suggestion in found.suggestions:
            then = plan(with_field(job, suggestion.field, suggestion.value), facts)
            assert isinstance(then, Plan)
            assert then.gpu_class == suggestion.gpu_class


@given(JOBS, FACTS)
def test_a_cpu_plan_always_exists(job: QLoRAJobSpec, facts: ModelFacts) -> None:
    found = plan(with_field(job, "resources.gpuClass", "cpu"), facts, settings=Defaults(cpu_memory_budget_bytes=GIB))
    assert isinstance(found, Plan)
    assert found.micro_batch_size * found.gradient_accumulation == job.training.global_batch_size
