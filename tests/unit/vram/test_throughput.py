"""Predicted speed: near what was measured on an H100, and in the right order elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_vram.gpus import KNOWN, GpuClass
from qlora_vram.throughput import flops, micro_batch_seconds, tokens_per_second
from tests.support import models
from tests.unit.vram.workloads import workload

GPUS = {gpu.name: gpu for gpu in KNOWN}
H100, A100, L4, T4 = (GPUS[name] for name in ("H100", "A100-80GB", "L4", "T4"))
LLAMA_8B = models.facts("Llama-3-8B")
BARE: dict[str, Any] = {"dropout": False, "packing": False}


QV = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("model", "run", "measured"),
    [
        # docs/results/speed
        ("Llama-3-8B", {"rows": 4, "length": 2048, "engine": "fast"}, 12_407),
        ("Llama-3-8B", {"rows": 4, "length": 2048, "engine": "fast", "checkpointed": 0}, 16_198),
        ("Llama-2-7B", {"rows": 4, "length": 1024, "engine": "fast", "rank": 64, "adapted": QV}, 13_325),
        ("Llama-2-7B", {"rows": 1, "length": 512, "engine": "fast", "accumulation": 1}, 8_222),
        ("Llama-2-70B", {"rows": 1, "length": 512, "engine": "fast", "accumulation": 1}, 902),
        # transformers and PEFT, one operation at a time
        ("Llama-3-8B", {"rows": 4, "length": 2048, "engine": "plain"}, 7_179),
        ("Llama-2-7B", {"rows": 1, "length": 512, "engine": "plain"}, 740),
    ],
)
def test_speeds_are_near_those_measured_on_an_h100(model: str, run: dict[str, Any], measured: int) -> None:
    facts = models.facts(model)
    adapted = run.pop("adapted", None)
    work = workload(facts, **({"accumulation": 4, **BARE} | run))
    if adapted:
        work = replace(work, targets=tuple(linear for linear in facts.linears if linear.name in adapted))
    assert 0.85 < tokens_per_second(work, H100) / measured < 1.25


def test_a_step_without_recomputation_is_four_operations_a_weight() -> None:
    work = workload(LLAMA_8B, 4, 2048, checkpointed=0, engine="fast")
    floor = 4 * LLAMA_8B.quantized_parameters * work.tokens
    assert floor < flops(work) < 1.3 * floor


def test_checkpointing_costs_a_forward_pass() -> None:
    none, full = (workload(LLAMA_8B, 4, 2048, checkpointed=layers) for layers in (0, 32))
    assert 2 * LLAMA_8B.quantized_parameters * none.tokens < flops(full) - flops(none)
    assert tokens_per_second(full, H100) < tokens_per_second(none, H100)


def test_faster_gpus_are_predicted_faster() -> None:
    speeds = [tokens_per_second(workload(LLAMA_8B, 4, 2048, engine="fast"), gpu) for gpu in (T4, L4, A100, H100)]
    assert speeds == sorted(speeds)


def test_small_micro_batches_are_bound_by_launches() -> None:
    """A faster GPU doesn't help them."""
    work = workload(LLAMA_8B, 1, 128)
    assert micro_batch_seconds(work, H100) == micro_batch_seconds(work, A100)


def test_rows_of_changing_lengths_dont_count_on_graphs() -> None:
    even = workload(LLAMA_8B, 1, 512, engine="fast")
    assert tokens_per_second(replace(even, changing=True), H100) < tokens_per_second(even, H100) / 2


def test_long_rows_pay_for_attention() -> None:
    short, long = workload(LLAMA_8B, 16, 2048, engine="fast"), workload(LLAMA_8B, 1, 32768, engine="fast")
    assert tokens_per_second(long, H100) < tokens_per_second(short, H100)


def test_offloading_is_bound_by_the_bus_at_most() -> None:
    here = workload(LLAMA_8B, 4, 2048, engine="fast")
    there = replace(here, shape=replace(here.shape, offload=True))
    assert tokens_per_second(there, H100) <= tokens_per_second(here, H100)
    assert tokens_per_second(there, T4) == tokens_per_second(here, T4)


def test_only_the_experts_that_a_token_visits_cost_time() -> None:
    mixture = models.facts("Mixtral-8x7B")
    work = workload(mixture, 4, 2048, checkpointed=0)
    assert flops(work) < 0.5 * 4 * mixture.parameters * work.tokens


def test_a_class_without_figures_is_ranked_all_the_same() -> None:
    assert tokens_per_second(workload(LLAMA_8B), GpuClass(name="new", memory_mib=80_000)) > 0
