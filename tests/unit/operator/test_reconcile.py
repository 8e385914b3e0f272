"""reconcile on the ordinary way: what is created, and what the status then says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_operator.decision import CreateJob
from qlorajob.identity import prepare_key
from qlorajob.status import Phase, Progress
from tests.support.reports import artifact, prepared
from tests.unit.operator.world import World, trained, training

MERGE = {"merge": {"enabled": True}}


# The ordinary way


def test_the_first_look_prepares() -> None:
    world = World()
    world.look()
    assert [job.step for job in world.jobs.values()] == ["prepare"]
    assert world.status.phase is Phase.PREPARING
    assert world.true() == {"Reconciling"}
    assert world.condition("Ready").status == "False"  # type: ignore[union-attr]


def test_prepared_work_is_planned_and_trained() -> None:
    world = World()
    world.prepare()
    assert world.status.phase is Phase.QUEUED
    assert world.status.plan is not None
    assert world.status.run is not None
    assert (world.status.run.id, world.status.run.attempt) == ("run1", 1)
    assert len(world.live("train")) == 1
    assert world.true() == {"Reconciling", "Prepared"}


def test_a_running_pod_is_training() -> None:
    world = training()
    assert world.status.phase is Phase.TRAINING


def test_a_pod_that_is_done_is_not_queued_again_while_its_job_has_yet_to_end() -> None:
    world = training()
    world.change("train", phase="Succeeded", exit_code=0)
    world.look()
    assert world.status.phase is Phase.TRAINING
    assert "is done" in world.message()


def test_progress_of_the_pod_reaches_the_status() -> None:
    world = training()
    world.change("train", progress=Progress(step=3, total_steps=60, loss=1.5, tokens_per_second=100.0, eta_seconds=75))
    world.look()
    assert world.status.progress is not None
    assert world.status.progress.step == 3
    assert world.status.display is not None
    assert (world.status.display.step, world.status.display.eta) == ("3/60", "1m15s")


def test_progress_survives_a_look_that_hears_nothing() -> None:
    world = training()
    world.change("train", progress=Progress(step=3, total_steps=60))
    world.look()
    world.change("train", progress=None)
    world.look()
    assert world.status.progress is not None
    assert world.status.progress.step == 3


def test_a_trained_adapter_completes_the_job() -> None:
    world = trained()
    assert world.status.phase is Phase.SUCCEEDED
    assert world.true() == {"Ready", "Complete", "Finished", "Prepared"}
    assert world.status.artifacts is not None
    assert world.status.artifacts.adapter == artifact("run1", "adapter")
    assert world.status.run is not None
    assert world.status.run.finished_at is not None
    assert world.status.memory is not None
    assert world.status.memory.peak_bytes == 3_000_000_000
    assert world.status.memory.predicted_bytes == world.status.plan.predicted_peak_bytes  # type: ignore[union-attr]


def test_finished_says_succeeded_or_failed() -> None:
    finished = trained().condition("Finished")
    assert finished is not None
    assert finished.reason == "Succeeded"


def test_merge_follows_training() -> None:
    world = trained(MERGE)
    assert world.status.phase is Phase.MERGING
    assert "Complete" not in world.true()
    world.merge()
    assert world.status.phase is Phase.SUCCEEDED
    assert world.status.artifacts is not None
    assert world.status.artifacts.merged == artifact("run1", "merged")
    assert world.status.artifacts.adapter == artifact("run1", "adapter")


def test_nothing_changes_on_another_look_at_a_finished_job() -> None:
    world = trained(MERGE)
    world.merge()
    before = world.status
    decision = world.look()
    assert decision.actions == ()
    assert decision.events == ()
    assert world.status == before


@pytest.mark.parametrize("stage", ["preparing", "queued", "training"])
def test_nothing_changes_on_another_look_at_work_under_way(stage: str) -> None:
    world = World()
    world.look() if stage == "preparing" else world.prepare()
    if stage == "training":
        world.run()
    world.look()
    before = world.status
    decision = world.look()
    assert (decision.actions, decision.events) == ((), ())
    assert world.status == before


# Odds and ends


def being_deleted(*finalizers: str) -> World:
    world = training()
    metadata = world.job.metadata.model_copy(update={"deletion_timestamp": world.now, "finalizers": finalizers})
    world.job = world.job.model_copy(update={"metadata": metadata})
    return world


def test_an_object_that_somebody_s_finalizer_keeps_gives_its_gpu_back() -> None:
    """The garbage collector takes its Jobs only once it is gone."""
    world = being_deleted("example.com/audit")
    before = world.status
    world.look()
    assert world.live("train") == []
    assert world.look().actions == ()
    assert world.status == before


@pytest.mark.parametrize("finalizer", ["orphan", "foregroundDeletion"])
def test_an_object_that_the_garbage_collector_is_at_work_on_is_left_to_it(finalizer: str) -> None:
    assert being_deleted(finalizer, "example.com/audit").look().actions == ()


def test_stale_live_jobs_of_the_same_object_are_deleted() -> None:
    world = training()
    current = world.status.job
    world.jobs["stray"] = replace(world.jobs[current or ""], name="stray", uid="stray")
    world.look()
    assert [job.name for job in world.live("train")] == [current]


def test_every_condition_carries_the_generation() -> None:
    world = training()
    world.edit({"backoffLimit": 1})
    world.look()
    assert {condition.observed_generation for condition in world.status.conditions} == {2}


def test_a_transition_time_moves_only_with_the_status() -> None:
    world = World()
    world.look()
    first = world.condition("Ready")
    world.prepare()
    second = world.condition("Ready")
    assert first is not None
    assert second is not None
    assert first.last_transition_time == second.last_transition_time
    assert first.reason != second.reason


def test_the_events_of_a_run_tell_its_story() -> None:
    world = trained(MERGE)
    world.merge()
    assert [event.reason for event in world.events] == [
        "Preparing", "Prepared", "Planned", "Queued", "Training", "Trained", "Merging", "Merged", "Succeeded",
    ]  # fmt: skip


def test_a_created_job_is_named_in_the_status() -> None:
    world = World()
    created = [action for action in world.look().actions if isinstance(action, CreateJob)]
    assert [action.name for action in created] == [world.status.job]


def test_prepared_facts_survive_in_the_status() -> None:
    world = trained()
    assert world.status.prepared == prepared(prepare_key(world.job.spec))
