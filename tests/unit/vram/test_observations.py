"""What finished runs took corrects what the next plans predict, and can't make them careless."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_vram.cuts import Cutter, Option
from qlora_vram.gpus import SHIPPED, GpuClass, usable_bytes
from qlora_vram.layers import detailed
from qlora_vram.memory import Breakdown, peak
from qlora_vram.observations import LIMIT, MOST, Observation, Observations, corrected, exhausted, observe, physical
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlora_vram.replan import replan
from qlora_vram.workload import Shape, Workload, workload
from qlorajob.identity import digest
from qlorajob.plan import ModelFacts, Plan
from qlorajob.resource import parse
from qlorajob.spec import QLoRAJobSpec
from tests.support import models
from tests.support.live import merged

IMAGE = "trainer:1"
START = datetime(2026, 1, 1, tzinfo=UTC)
GPU = next(gpu for gpu in SHIPPED if gpu.name == "L4")
MODEL = detailed(models.facts("Llama-3-8B"))
SMALL = detailed(models.facts("TinyLlama-1.1B"))


def spec(changes: dict[str, Any] | None = None) -> QLoRAJobSpec:
    base = {
        "model": {"uri": "s3://models/m"},
        "dataset": {"uri": "s3://datasets/d"},
        "output": {"uri": "s3://adapters/x", "credentialsSecretRef": {"name": "s3"}},
        "training": {"maxSequenceLength": 1024},
        "resources": {"gpuClass": GPU.name},
    }
    manifest = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "x", "namespace": "team", "uid": "u", "generation": 1},
        "spec": merged(base, changes or {}),
    }
    return parse(manifest).spec


def work(rows: int = 2, layers: int = 32, facts: ModelFacts = MODEL, **changes: Any) -> Workload:
    return replace(workload(spec(), facts, GPU, Shape(rows, layers), 1), **changes)


def reshaped(cut: Workload, **changes: int) -> Workload:
    return replace(cut, shape=replace(cut.shape, **changes))  # type: ignore[arg-type]


def seen(cut: Workload, off: float = 0.0, at: int = 0, gpu: GpuClass = GPU, **fields: Any) -> Observation:
    """A run of `cut` that took `off` (a share) more than predicted."""
    predicted = peak(cut)
    took = fields.pop("peak_bytes", int(predicted.total * (1 + off)))
    speed = fields.pop("tokens_per_second", 100.0)
    return observe(
        cut,
        gpu,
        predicted,
        trainer=fields.pop("trainer", IMAGE),
        peak_bytes=took,
        tokens_per_second=speed,
        at=START + timedelta(seconds=at),
    )


def failed(cut: Workload, at: int = 0, gpu: GpuClass = GPU) -> Observation:
    """A run of `cut` that was out of memory."""
    return exhausted(cut, gpu, peak(cut), trainer=IMAGE, at=START + timedelta(seconds=at))


def known(*observations: Observation, trainer: str = IMAGE) -> Observations:
    result = Observations(trainer=trainer)
    for observation in observations:
        result = result.including(observation)
    return result


def expected(cut: Workload, observations: Observations, gpu: GpuClass = GPU) -> Breakdown:
    return corrected(peak(cut), cut, gpu, observations)


# What is expected


@pytest.mark.parametrize("off", [-0.03, 0.1, 0.4])
def test_the_same_shape_takes_what_it_took(off: float) -> None:
    cut = work()
    observation = seen(cut, off)
    assert expected(cut, known(observation)).total == observation.peak_bytes


def test_nothing_known_changes_nothing() -> None:
    assert expected(work(), Observations()) == peak(work())


def test_the_breakdown_is_still_a_sum_of_parts_and_names_the_observation() -> None:
    cut = work()
    found = expected(cut, known(seen(cut, 0.1)))
    tensors = {name: size for name, size in peak(cut).components.items() if name not in ("slack", "context")}
    assert found.components == {**tensors, "observed": found.total - physical(peak(cut))}
    assert min(found.components.values()) > 0


def test_a_measurement_that_is_far_too_small_is_not_believed() -> None:
    cut = work()
    assert expected(cut, known(seen(cut, peak_bytes=1))) == peak(cut)


def test_a_measurement_that_is_too_small_stops_at_the_tensors() -> None:
    cut = work()
    tensors = physical(peak(cut))
    assert expected(cut, known(seen(cut, peak_bytes=int(0.9 * tensors)))).total == tensors


def test_another_cut_of_a_measured_job_takes_as_much_more() -> None:
    observation = seen(work(rows=2), 0.05)
    residual = observation.peak_bytes - observation.predicted_bytes
    assert expected(work(rows=1), known(observation)).total == peak(work(rows=1)).total + residual


def test_three_runs_of_other_jobs_correct_a_class_and_two_do_not() -> None:
    others = [work(facts=SMALL), work(facts=SMALL, packing=False), work(dropout=False)]
    runs = [seen(other, peak_bytes=peak(other).total + extra) for other, extra in zip(others, (1, 5, 9), strict=True)]
    cut = work()
    assert expected(cut, known(*runs)).total == peak(cut).total + 5
    assert expected(cut, known(*runs[:2])) == peak(cut)
    other = next(gpu for gpu in SHIPPED if gpu.name == "A10")
    assert expected(cut, known(*runs), other) == peak(cut)


def test_a_correction_of_what_was_not_measured_is_bounded() -> None:
    cut = work(rows=1)
    most = peak(cut).total * MOST // 100
    assert expected(cut, known(seen(work(rows=2), 3.0))).total == peak(cut).total + most


def test_a_cut_that_was_out_of_memory_and_larger_ones_do_not_fit() -> None:
    observations, smallest = known(failed(work(rows=2))), work(rows=2)
    larger = (work(rows=3), work(rows=2, length=2048), work(rows=2, layers=31), reshaped(smallest, cached=True))
    for cut in (smallest, *larger):
        assert expected(cut, observations).total > usable_bytes(GPU)


def test_a_job_that_was_out_of_memory_is_expected_to_take_the_most_in_smaller_cuts() -> None:
    cut = work(rows=1)
    modelled = peak(cut).total
    assert expected(cut, known(failed(work(rows=2)))).total == modelled + modelled * MOST // 100


def test_a_run_that_ended_well_outweighs_one_of_no_larger_cut_that_was_out_of_memory() -> None:
    held = seen(work(rows=4), 0.0, at=0)
    assert expected(work(rows=4), known(held, failed(work(rows=2), at=1))).total == held.peak_bytes
    assert expected(work(rows=2), known(held, failed(work(rows=2), at=1))).total <= usable_bytes(GPU)


def test_a_run_that_was_out_of_memory_is_no_measurement_for_other_jobs() -> None:
    runs = [failed(other) for other in (work(facts=SMALL), work(facts=SMALL, packing=False), work(dropout=False))]
    assert expected(work(), known(*runs)) == peak(work())


def test_another_trainer_says_nothing() -> None:
    cut = work()
    assert expected(cut, known(seen(cut, 0.1, trainer="trainer:0"))) == peak(cut)


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": False},
        {"optimizer": "adamw_torch"},
        {"double_quantization": False},
        {"packing": False},
        {"engine": "plain"},
        {"compute_bytes": 4},
        {"autocast": False},
        {"recast": True},
        {"targets": ()},
        {"facts": detailed(models.facts("Mistral-7B"))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_the_peak_follows_from_tells_jobs_apart(change: dict[str, Any]) -> None:
    cut = work()
    other = replace(cut, **change)
    assert other != cut
    assert seen(other).job != seen(cut).job


def test_what_was_measured_without_a_cache_bounds_a_run_with_one_and_the_other_way_round() -> None:
    without, cached = work(), reshaped(work(), cached=True)
    assert seen(without).job == seen(cached).job
    assert seen(without).key != seen(cached).key
    low, high = int(0.92 * peak(cached).total), int(1.4 * peak(without).total)
    assert expected(without, known(seen(cached, peak_bytes=low))).total <= low
    assert expected(cached, known(seen(without, peak_bytes=high))).total >= high


def test_an_observation_from_before_there_was_a_cache_is_one_without() -> None:
    """Its key too is the one under which it was kept: entries that nobody reads would never make way."""
    run = seen(work())
    written = json.loads(run.to_json())
    del written["cached"]
    shape = [run.job, run.rows, run.length, run.rank, -run.checkpointed_layers, not run.offload]
    assert Observations.read({digest(shape)[:16]: json.dumps(written)}, IMAGE) == known(run)


def test_accumulation_and_the_download_do_not() -> None:
    cut = work()
    other = replace(cut, accumulation=7, facts=cut.facts.model_copy(update={"weight_bytes": 1}))
    assert seen(other).key == seen(cut).key


# Properties

numbers = st.integers(1, 8)
cuts = st.builds(
    lambda rows, length, rank, layers, cached: reshaped(
        work(rows, layers, length=64 * length, rank=8 * rank), cached=cached
    ),
    rows=numbers,
    length=st.integers(1, 32),
    rank=numbers,
    layers=st.integers(0, 32),
    cached=st.booleans(),
)
shares = st.floats(-1, 2, allow_nan=False)
experiences = st.lists(st.tuples(cuts, st.none() | shares), max_size=6).map(
    lambda runs: known(*(_ended(cut, off, n) for n, (cut, off) in enumerate(runs)))
)


def _ended(cut: Workload, off: float | None, at: int) -> Observation:
    """`off` is what it took beyond the prediction; without, it was out of memory."""
    return failed(cut, at) if off is None else seen(cut, off, at=at, peak_bytes=_took(cut, off))


def _took(cut: Workload, off: float) -> int:
    return max(1, int(peak(cut).total * (1 + off)))


@given(cuts, experiences)
@settings(max_examples=100, deadline=None)
def test_no_observation_makes_a_prediction_smaller_than_its_tensors(cut: Workload, observations: Observations) -> None:
    found = expected(cut, observations)
    assert found.total >= physical(peak(cut))
    assert all(size > 0 for size in found.components.values())


@given(cuts, experiences, st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_larger_cut_is_never_expected_to_take_less(
    cut: Workload, observations: Observations, rows: int, length: int, rank: int, layers: int, cached: bool
) -> None:
    shape = cut.shape
    larger = reshaped(
        replace(cut, length=cut.length + 64 * length, rank=cut.rank + rank),
        rows=shape.rows + rows,
        checkpointed_layers=max(0, shape.checkpointed_layers - layers),
        cached=shape.cached or cached,
    )
    assert expected(larger, observations).total >= expected(cut, observations).total


@given(experiences, st.sampled_from([512, 1024, 2048]), st.sampled_from(["auto", GPU.name]))
@settings(max_examples=40, deadline=None)
def test_a_plan_fits_whatever_was_observed(observations: Observations, length: int, gpu_class: str) -> None:
    asked = spec({"training": {"maxSequenceLength": length}, "resources": {"gpuClass": gpu_class}})
    planned = plan(asked, MODEL, observations=observations)
    assert isinstance(planned, Plan)
    gpu = next(gpu for gpu in SHIPPED if gpu.name == planned.gpu_class)
    assert planned.predicted_peak_bytes <= usable_bytes(gpu)
    assert sum(planned.breakdown.values()) == planned.predicted_peak_bytes
    assert planned.micro_batch_size * planned.gradient_accumulation == asked.training.global_batch_size


@given(st.floats(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_class_that_held_a_job_holds_it_still(off: float) -> None:
    first = plan(spec(), MODEL)
    assert isinstance(first, Plan)
    assert isinstance(plan(spec(), MODEL, observations=known(run_of(first, off))), Plan)


# Plans


def run_of(planned: Plan, off: float, facts: ModelFacts = MODEL, asked: QLoRAJobSpec | None = None) -> Observation:
    """The run of a plan that took `off` more than the plan said."""
    cut = Cutter(asked or spec(), facts, Option(GPU)).planned(planned)
    return seen(cut, peak_bytes=int(planned.predicted_peak_bytes * (1 + off)))


@pytest.mark.parametrize("off", [-0.04, 0.1])
def test_the_next_plan_of_a_shape_is_within_two_percent_of_its_peak(off: float) -> None:
    fixed = spec({"training": {"microBatchSize": 1, "gradientCheckpointing": True}})
    first = plan(fixed, MODEL)
    assert isinstance(first, Plan)
    run = run_of(first, off, asked=fixed)
    following = plan(fixed, MODEL, observations=known(run))
    assert isinstance(following, Plan)
    assert abs(following.predicted_peak_bytes / run.peak_bytes - 1) < 0.02
    assert following.predicted_tokens_per_second == run.tokens_per_second


def test_a_run_that_nearly_filled_its_gpu_is_planned_smaller_and_not_merely_elsewhere() -> None:
    """Its next plan mustn't be a larger cut that nobody has measured."""
    first = plan(spec(), MODEL)
    assert isinstance(first, Plan)
    cutter = Cutter(spec(), MODEL, Option(GPU))
    following = plan(spec(), MODEL, observations=known(run_of(first, 0.02)))
    assert isinstance(following, Plan)
    before, after = cutter.modelled(cutter.planned(first)), cutter.modelled(cutter.planned(following))
    assert after.total <= before.total


def test_jobs_of_one_shape_walk_down_once_between_them() -> None:
    """Each is out of memory in its first plan: none begins where another has failed, and the last is tried again."""
    observations, seen_plans = known(), []
    for number in range(8):
        planned = plan(spec(), MODEL, observations=observations)
        assert isinstance(planned, Plan)
        seen_plans.append((planned.micro_batch_size, planned.checkpointed_layers, planned.offload_checkpoints))
        observations = observations.including(failed(Cutter(spec(), MODEL, Option(GPU)).planned(planned), at=number))
    tried = list(dict.fromkeys(seen_plans))
    assert seen_plans == tried + [tried[-1]] * (len(seen_plans) - len(tried))


def test_only_runs_out_of_memory_stand_in_the_way_of_another_try() -> None:
    fixed = spec({"training": {"microBatchSize": 1, "gradientCheckpointing": False}})
    first = plan(fixed, MODEL)
    assert isinstance(first, Plan)
    again = plan(fixed, MODEL, observations=known(failed(Cutter(fixed, MODEL, Option(GPU)).planned(first))))
    assert isinstance(again, Plan)
    assert "another try" in again.reason
    hopeless = spec({"training": {"maxSequenceLength": 131072}})
    assert isinstance(plan(hopeless, MODEL, observations=known(failed(work()))), DoesNotFit)


def test_replanning_still_ends_and_takes_less_each_time() -> None:
    planned = plan(spec(), MODEL)
    assert isinstance(planned, Plan)
    cutter, observations = Cutter(spec(), MODEL, Option(GPU)), known(run_of(planned, 1.0))
    sizes = [cutter.modelled(cutter.planned(planned)).total]
    following = replan(planned, spec(), MODEL, observations=observations)
    while isinstance(following, Plan):
        sizes.append(cutter.modelled(cutter.planned(following)).total)
        following = replan(following, spec(), MODEL, observations=observations)
    assert isinstance(following, DoesNotFit)
    assert len(sizes) > 1
    assert sizes == sorted(set(sizes), reverse=True)


# Keeping


def many(number: int) -> Sequence[Observation]:
    base = seen(work())
    return [base.model_copy(update={"rank": n + 1, "at": START + timedelta(seconds=n)}) for n in range(number)]


def test_observations_are_bounded_and_the_oldest_go() -> None:
    runs = many(LIMIT + 5)
    assert set(known(*runs).entries.values()) == set(runs[5:])


def test_a_newer_run_of_a_shape_replaces_the_older() -> None:
    cut = work()
    observations = known(seen(cut, 0.1, at=0), seen(cut, 0.2, at=1))
    assert expected(cut, observations).total == int(peak(cut).total * 1.2)
    assert len(observations.entries) == 1


def test_what_was_written_is_read_and_what_others_wrote_is_passed_over() -> None:
    observations = known(*many(3))
    data = {key: observation.to_json() for key, observation in observations.entries.items()}
    foreign = {"note": "hands off", "x": "{}", "0" * 16: next(iter(data.values())), "y": '{"job": 1}'}
    assert Observations.read(data | foreign, IMAGE) == observations
