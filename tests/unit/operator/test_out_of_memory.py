"""A run that is out of GPU memory goes on with a plan that takes less, and what remembers that is in the status."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_operator.decision import Measurement
from qlorajob.errors import ExitCode, Reason
from qlorajob.plan import Plan
from qlorajob.run import RunConfig
from qlorajob.status import Phase
from tests.support import gpus
from tests.support.reports import LLAMA_7B, failure
from tests.unit.operator.world import World, qlorajob

L4 = gpus.whole("a", "NVIDIA-L4")
A10 = gpus.whole("b", "NVIDIA-A10")
A100 = gpus.whole("c", "NVIDIA-A100-SXM4-80GB")
JOB: dict[str, Any] = {"resources": {"gpuClass": "auto"}, "training": {"maxSequenceLength": 512}}
ONE_CUT: dict[str, Any] = {
    "resources": {"gpuClass": "L4"},
    "training": {"maxSequenceLength": 2048, "microBatchSize": 1, "gradientCheckpointing": False},
}
"""Without room for a cache of weights, which would be one more thing to give up."""


def training(spec: dict[str, Any] | None = None, *nodes: dict[str, Any]) -> World:
    """A world whose run is being trained on a GPU."""
    world = World(qlorajob(JOB if spec is None else spec), fleet=gpus.fleet(*(nodes or (L4,))))
    world.prepare(facts=LLAMA_7B)
    world.run()
    world.look()
    return world


def run_out(world: World, *, record: bool = True) -> None:
    """The training pod is out of GPU memory, and the operator looks."""
    report = failure("train", ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, "tried to allocate 2 GiB")
    world.end("train", ExitCode.OUT_OF_MEMORY, report)
    world.look(record=record)


def plan_of(world: World) -> Plan:
    plan = world.status.plan
    assert plan is not None
    return plan


def plan_in(world: World, job: str) -> Plan:
    """The plan that the Job's pods were given."""
    container = world.manifests[job]["spec"]["template"]["spec"]["containers"][0]
    text = next(item["value"] for item in container["env"] if item["name"] == "QLORA_RUN_CONFIG")
    plan = RunConfig.from_json(json.dumps(json.loads(text.replace("$$", "$")))).plan
    assert plan is not None
    return plan


def train_jobs(world: World) -> list[str]:
    return [name for name in world.created if "-train-" in name]


def shape(plan: Plan) -> tuple[Any, ...]:
    return plan.gpu_class, plan.micro_batch_size, plan.checkpointed_layers, plan.offload_checkpoints


def test_the_same_run_goes_on_with_half_the_micro_batch() -> None:
    world = training()
    before, started = plan_of(world), world.status.run
    run_out(world)
    after, run = plan_of(world), world.status.run
    assert run is not None
    assert started is not None
    assert after.micro_batch_size == before.micro_batch_size // 2
    assert after.gradient_accumulation == before.gradient_accumulation * 2
    assert (run.id, run.attempt, run.replans, run.finished_at) == (started.id, 2, 1, None)
    assert len(world.live("train")) == 1
    assert plan_in(world, world.status.job or "") == after
    assert world.status.phase is Phase.QUEUED
    assert "Failed" not in world.true()


def test_one_warning_says_what_changed() -> None:
    world = training()
    world.events.clear()
    run_out(world)
    (warning,) = [event for event in world.events if event.type == "Warning"]
    assert warning.reason == "OutOfMemory"
    assert warning.message == plan_of(world).reason
    assert "Planned" not in {event.reason for event in world.events}
    before = len(world.events)
    world.look()
    assert len(world.events) == before


def test_each_replan_is_counted() -> None:
    world = training()
    world.end("train", ExitCode.OUT_OF_MEMORY)
    assert Measurement("oom_replans", 1) in world.look().measurements
    assert Measurement("oom_replans", 1) not in world.look().measurements


def test_the_ladder_ends_in_a_failure_that_names_the_knobs() -> None:
    world = training(JOB, L4, A100)
    seen = [shape(plan_of(world))]
    while world.status.phase is not Phase.FAILED:
        run_out(world)
        seen.append(shape(plan_of(world)))
        assert len(seen) < 32
        if world.live("train"):
            world.run()
    assert len(set(seen)) == len(seen) - 1  # the last look has no other plan
    assert {name for name, *_ in seen} == {"L4", "A100-80GB"}
    assert world.reason() == Reason.OUT_OF_MEMORY
    assert world.message().startswith("spec.resources.gpuClass: out of GPU memory on A100-80GB")
    assert "training.maxSequenceLength" in world.message()
    assert world.status.run is not None
    assert world.status.run.finished_at is not None


def test_what_the_user_fixed_leaves_nothing_to_try() -> None:
    world = training(ONE_CUT)
    run_out(world)
    assert world.status.phase is Phase.FAILED
    assert world.reason() == Reason.OUT_OF_MEMORY
    assert world.live("train") == []


def test_an_exit_code_without_a_report_counts() -> None:
    world = training()
    world.end("train", ExitCode.OUT_OF_MEMORY, None)
    world.look()
    assert world.status.run is not None
    assert world.status.run.replans == 1


def test_a_pod_that_is_gone_with_its_node_is_known_by_its_jobs_words() -> None:
    world = training()
    words = "Container trainer for pod team/x failed with exit code 65 matching FailJob rule at index 2"
    world.fail_job(world.status.job or "", "PodFailurePolicy", words)
    world.pods.clear()
    world.now = world.now.replace(minute=30)
    world.look()
    assert world.status.run is not None
    assert world.status.run.replans == 1


# What remembers it


def test_an_operator_that_dies_before_it_writes_the_status_starts_no_second_job() -> None:
    world = training()
    run_out(world, record=False)
    world.look()
    assert len(train_jobs(world)) == 2
    assert len(world.live("train")) == 1
    assert plan_in(world, train_jobs(world)[1]) == plan_of(world)


def test_suspension_keeps_the_smaller_plan() -> None:
    world = training()
    run_out(world)
    smaller = plan_of(world)
    for suspend in (True, False):
        world.edit({"suspend": suspend})
        world.look()
        world.collect()
    world.look()
    assert plan_of(world) == smaller
    assert plan_in(world, world.status.job or "") == smaller


def test_a_run_that_is_suspended_while_it_runs_out_goes_on_with_the_smaller_plan() -> None:
    world = training()
    before = plan_of(world)
    world.edit({"suspend": True})
    run_out(world)
    assert world.status.phase is Phase.SUSPENDED
    world.edit({"suspend": False})
    world.look()
    assert plan_in(world, world.status.job or "").micro_batch_size == before.micro_batch_size // 2


def test_a_lost_job_goes_on_with_the_smaller_plan() -> None:
    world = training()
    run_out(world)
    smaller = plan_of(world)
    world.jobs.clear()
    world.pods.clear()
    world.look()
    world.prepare(facts=LLAMA_7B)
    assert plan_in(world, world.status.job or "") == smaller


def test_a_retry_of_a_run_that_was_out_of_memory_does_not_begin_with_the_first_plan() -> None:
    world = training()
    run_out(world)
    smaller = plan_of(world)
    world.run()
    world.end("train", ExitCode.INVALID, failure("train", ExitCode.INVALID, Reason.DATASET_INVALID, "bad row"))
    world.look()
    world.edit({"backoffLimit": 7})
    world.prepare(facts=LLAMA_7B)
    assert plan_in(world, world.status.job or "") == smaller


@pytest.mark.parametrize("changes", [{"microBatchSize": 1}, {"seed": 7}])
def test_an_edit_of_what_is_planned_plans_anew(changes: dict[str, Any]) -> None:
    world = training()
    run_out(world)
    world.edit({"training": changes, "suspend": True})
    world.look()
    world.collect()
    world.edit({"suspend": False})
    world.look()
    if world.live("prepare"):
        world.prepare("run2", facts=LLAMA_7B)
    assert world.status.run is not None
    assert (world.status.run.replans, world.status.plan is not None) == (0, True)


def test_a_spec_that_was_edited_since_the_plan_is_planned_anew() -> None:
    world = training(ONE_CUT)
    world.edit({"training": {"gradientCheckpointing": True}})
    world.look()
    run_out(world)
    assert plan_of(world).checkpointing == "full"
    assert world.status.run is not None
    assert (world.status.run.attempt, world.status.run.replans) == (2, 0)
    assert len(world.live("train")) == 1


# GPUs that go


def test_a_class_that_is_gone_is_planned_around() -> None:
    world = training(JOB, L4, A10)
    world.end("train", ExitCode.OUT_OF_MEMORY)
    gone = plan_of(world).gpu_class
    world.fleet = gpus.fleet(A10 if gone == "L4" else L4)
    world.look()
    assert plan_of(world).gpu_class != gone
    assert len(world.live("train")) == 1


def test_a_smaller_plan_waits_for_its_class_where_no_other_will_do() -> None:
    world = training()
    run_out(world)
    smaller, there = plan_of(world), world.fleet
    world.edit({"suspend": True})
    world.look()
    world.collect()
    world.fleet = gpus.fleet(gpus.whole("t", "Tesla-P100-PCIE-16GB"))
    world.edit({"suspend": False})
    world.look()
    assert world.status.phase is Phase.PENDING
    assert "Stalled" in world.true()
    world.fleet = there
    world.look()
    assert plan_in(world, world.status.job or "") == smaller


# Learning


def test_a_later_job_of_the_same_shape_begins_with_less() -> None:
    world = training()
    first = plan_of(world)
    run_out(world)
    later = World(qlorajob(JOB, uid="u2", name="y"), fleet=world.fleet, observations=world.observations)
    later.prepare(facts=LLAMA_7B)
    less = plan_of(later)
    fewer_rows = less.micro_batch_size < first.micro_batch_size
    assert fewer_rows or less.checkpointed_layers > first.checkpointed_layers


def test_a_cut_that_nothing_can_replace_is_tried_again_when_it_is_asked_for_again() -> None:
    world = training(ONE_CUT)
    run_out(world)
    world.edit(annotations={"qlora.dev/retry-at": "1"})
    world.prepare(facts=LLAMA_7B)
    assert len(world.live("train")) == 1
    assert "another try" in plan_of(world).reason
