"""reconcile looks again: nothing is done twice, whatever was lost in between."""

from __future__ import annotations

from datetime import timedelta

from qlorajob.errors import Reason
from qlorajob.identity import merge_key, prepare_key
from qlorajob.status import Artifacts, Phase
from tests.support.reports import adapter, artifact, prepare_report
from tests.unit.operator.world import World, qlorajob, trained, training

MERGE = {"merge": {"enabled": True}}


# Idempotence


def test_a_finished_job_whose_children_expired_stays_finished() -> None:
    world = trained()
    world.jobs.clear()
    world.pods.clear()
    assert world.look().actions == ()
    assert world.status.phase is Phase.SUCCEEDED


def test_a_finished_run_in_s3_isnt_trained_again() -> None:
    world = World()
    world.prepare(artifacts=adapter("run1"))
    assert world.status.phase is Phase.SUCCEEDED
    assert world.reason() == Reason.ALREADY_TRAINED
    assert world.live("train") == []


def test_a_finished_run_in_s3_is_merged_when_that_is_missing() -> None:
    world = World(qlorajob(MERGE))
    world.prepare(artifacts=adapter("run1"))
    assert world.status.phase is Phase.MERGING


def test_a_finished_run_in_s3_is_merged_when_its_merged_model_is_of_another_type() -> None:
    both = Artifacts(adapter=artifact("run1", "adapter"), merged=artifact("run1", "merged"))
    world = World(qlorajob(MERGE))
    world.prepare(artifacts=both)
    assert world.status.phase is Phase.MERGING


def test_a_finished_run_in_s3_that_is_merged_as_wanted_isnt_merged_again() -> None:
    both = Artifacts(adapter=artifact("run1", "adapter"), merged=artifact("run1", "merged"))
    world = World(qlorajob(MERGE))
    world.prepare(artifacts=both, merge_key=merge_key(world.job.spec))
    assert world.status.phase is Phase.SUCCEEDED


def test_a_crash_between_creating_and_recording_a_job_creates_no_second() -> None:
    world = World()
    world.look()
    world.end("prepare", 0, prepare_report(prepare_key(world.job.spec)))
    world.look(record=False)
    world.look()
    assert [name for name in world.created if "-train-" in name] == [world.status.job]
    assert len(world.live("train")) == 1


def test_merge_enabled_after_success_only_merges() -> None:
    world = trained()
    world.edit(MERGE)
    world.look()
    assert world.status.phase is Phase.MERGING
    assert world.live("train") == []
    world.merge()
    assert world.status.phase is Phase.SUCCEEDED


def test_another_merge_type_merges_again() -> None:
    world = trained(MERGE)
    world.merge()
    world.edit({"merge": {"dtype": "float16"}})
    world.look()
    assert world.status.phase is Phase.MERGING


def test_a_wanted_gguf_file_that_isnt_reported_is_an_error() -> None:
    world = trained({"merge": {"enabled": True, "gguf": {}}})
    world.merge(gguf=False)
    assert world.reason() == Reason.INTERNAL_ERROR


def test_an_edit_that_doesnt_change_the_result_leaves_the_run_alone() -> None:
    world = training()
    before = world.status.job
    world.edit({"ttlSecondsAfterFinished": 60, "queueName": "q", "training": {"microBatchSize": 1}})
    assert world.look().actions == ()
    assert world.status.job == before
    assert world.status.observed_generation == 2


# What got lost


def test_a_report_that_lags_behind_its_job_is_waited_for() -> None:
    world = World()
    world.look()
    pod = world.pod("prepare")
    world.end("prepare", 0, prepare_report(prepare_key(world.job.spec)))
    ended = world.pods.pop(pod.name)
    decision = world.look()
    assert decision.actions == ()
    assert decision.requeue_after is not None
    world.pods[pod.name] = ended
    world.look()
    assert len(world.live("train")) == 1


def test_a_lost_report_of_prepare_prepares_again() -> None:
    world = World()
    world.look()
    world.end("prepare", 0, prepare_report(prepare_key(world.job.spec)))
    world.pods.clear()
    world.now += timedelta(minutes=1)
    world.look()
    assert len(world.live("prepare")) == 1


def test_a_lost_training_job_looks_into_s3_before_it_takes_a_gpu_again() -> None:
    world = training()
    world.jobs.clear()
    world.pods.clear()
    world.look()
    assert len(world.live("prepare")) == 1
    assert world.live("train") == []
    world.end("prepare", 0, prepare_report(prepare_key(world.job.spec), artifacts=adapter("run1")))
    world.look()
    assert world.status.phase is Phase.SUCCEEDED


def test_a_training_job_that_is_lost_while_suspended_is_looked_for_in_s3_on_resume() -> None:
    world = training()
    world.edit({"suspend": True})
    world.jobs.clear()  # it ended before the edit was seen, and was deleted by its TTL
    world.pods.clear()
    world.look()
    assert world.status.phase is Phase.SUSPENDED
    world.edit({"suspend": False})
    world.look()
    assert len(world.live("prepare")) == 1
    assert world.live("train") == []


def test_an_unreadable_report_is_an_error_not_a_loop() -> None:
    world = World()
    world.look()
    world.end("prepare", 0, None, last_words="hello")
    world.look()
    assert world.reason() == Reason.INTERNAL_ERROR


def test_a_report_on_other_inputs_is_an_error_not_a_loop() -> None:
    world = World()
    world.look()
    world.end("prepare", 0, prepare_report("another-key"))
    world.look()
    assert world.reason() == Reason.INTERNAL_ERROR
