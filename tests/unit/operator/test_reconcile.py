"""reconcile, situation by situation: what is created, and what the status then says."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from qlora_operator.decision import CreateJob
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import prepare_key
from qlorajob.run import RunReport
from qlorajob.status import Phase, Progress
from tests.support.reports import LLAMA_7B, adapter, artifact, failure, prepare_report, prepared, train_report
from tests.unit.operator.world import World, qlorajob

MERGE = {"merge": {"enabled": True}}


def trained(spec: dict[str, Any] | None = None) -> World:
    world = World(qlorajob(spec))
    world.prepare()
    world.train()
    return world


def training(spec: dict[str, Any] | None = None) -> World:
    world = World(qlorajob(spec))
    world.prepare()
    world.run()
    world.look()
    return world


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


# Retraining


def test_a_changed_spec_replaces_the_running_run() -> None:
    world = training()
    world.edit({"training": {"learningRate": 1e-5}})
    world.look()
    assert world.live("train") == []
    assert len(world.live("prepare")) == 1
    assert [(entry.id, entry.outcome) for entry in world.status.history] == [("run1", "Replaced")]
    assert world.status.artifacts is None
    assert world.status.progress is None


def test_a_new_run_waits_for_the_old_runs_pods() -> None:
    world = training()
    world.edit({"training": {"learningRate": 1e-5}})
    world.prepare("run2")
    assert world.live("train") == []
    assert "to stop" in world.message()
    world.collect()
    world.look()
    assert len(world.live("train")) == 1


def test_a_finished_run_goes_into_history_with_its_adapter() -> None:
    world = trained()
    world.edit({"lora": {"rank": 8}})
    world.prepare("run2")
    entry = world.status.history[0]
    assert (entry.id, entry.outcome, entry.adapter, entry.loss) == (
        "run1",
        "Succeeded",
        "s3://adapters/run1/adapter",
        0.5,
    )
    assert world.status.run is not None
    assert world.status.run.id == "run2"
    assert not {"Complete", "Finished", "Ready"} & world.true()


def test_going_back_to_an_earlier_spec_takes_it_out_of_history() -> None:
    world = trained()
    world.edit({"lora": {"rank": 8}})
    world.prepare("run2")
    world.edit({"lora": {"rank": 16}})
    world.prepare("run1", artifacts=adapter("run1"))
    assert [entry.id for entry in world.status.history] == ["run2"]
    assert world.status.phase is Phase.SUCCEEDED


def test_history_is_bounded() -> None:
    world = World()
    for number in range(14):
        world.edit({"training": {"seed": number}})
        world.collect()
        world.prepare(f"run{number}")
    assert len(world.status.history) == 10
    assert world.status.history[0].id == "run12"


def test_a_recreated_object_doesnt_touch_its_predecessors_jobs_but_waits_for_them() -> None:
    world = training()
    old = next(iter(world.live("train")))
    world.job = qlorajob(uid="u2")
    world.prepare()
    assert old.name in world.jobs
    assert [job.owner_uid for job in world.live("train")] == ["u1"]
    assert "to stop" in world.message()
    del world.jobs[old.name]
    world.collect()
    world.look()
    assert [job.owner_uid for job in world.live("train")] == ["u2"]


# The gate


def test_an_adapter_that_isnt_better_is_complete_but_not_promoted() -> None:
    world = World(qlorajob(MERGE))
    world.prepare()
    world.train(promoted=False)
    assert world.status.phase is Phase.SUCCEEDED
    assert world.condition("Promoted").status == "False"  # type: ignore[union-attr]
    assert world.reason() == Reason.NOT_BETTER_THAN_BASE
    assert world.live("merge") == []


def test_an_adapter_that_is_better_is_promoted() -> None:
    world = World()
    world.prepare()
    world.train(promoted=True)
    assert "Promoted" in world.true()


def test_a_gates_verdict_is_forgotten_with_its_run() -> None:
    world = World()
    world.prepare()
    world.train(promoted=False)
    world.edit({"lora": {"rank": 8}})
    world.look()
    assert world.condition("Promoted") is None


# Suspend


def test_suspend_deletes_the_live_job() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    assert world.live("train") == []
    assert world.status.phase is Phase.SUSPENDED
    assert "Suspended" in world.true()
    assert not {"Reconciling", "Stalled", "Failed"} & world.true()


def test_a_suspended_job_says_that_its_pod_is_still_stopping() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.look()
    assert "writing a checkpoint" in world.message()
    world.collect()
    world.look()
    assert "last checkpoint" in world.message()


def test_resume_is_the_next_attempt_of_the_same_run() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.collect()
    world.edit({"suspend": False})
    world.look()
    assert world.status.run is not None
    assert (world.status.run.id, world.status.run.attempt) == ("run1", 2)
    assert world.condition("Suspended").status == "False"  # type: ignore[union-attr]


def test_resume_waits_for_the_stopping_pod() -> None:
    world = training()
    world.edit({"suspend": True})
    world.look()
    world.edit({"suspend": False})
    world.look()
    assert world.live("train") == []


def test_a_job_created_suspended_does_nothing() -> None:
    world = World(qlorajob({"suspend": True}))
    assert world.look().actions == ()
    assert world.status.phase is Phase.SUSPENDED


def test_training_that_ends_while_it_is_being_suspended_counts() -> None:
    world = training()
    world.edit({"suspend": True})
    world.end("train", 0, train_report())
    world.look()
    assert world.status.phase is Phase.SUCCEEDED


def test_a_finished_job_stays_finished_when_suspended() -> None:
    world = trained()
    world.edit({"suspend": True})
    world.look()
    assert world.status.phase is Phase.SUCCEEDED


# Queue


def test_a_queued_job_waits_suspended_for_admission() -> None:
    world = World(qlorajob({"queueName": "team-a"}))
    world.prepare()
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert "queue team-a" in world.message()
    world.admit()
    world.run()
    world.look()
    assert world.status.phase is Phase.TRAINING


def test_preemption_is_a_requeue_not_a_failure() -> None:
    world = World(qlorajob({"queueName": "team-a"}))
    world.prepare()
    world.admit()
    world.run()
    world.look()
    name = world.live("train")[0].name
    world.jobs[name] = replace(world.jobs[name], state="suspended")
    world.end("train", 143)
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert "Failed" not in world.true()
    assert world.status.job == name


# Plans that can't be


def test_a_model_that_fits_no_gpu_fails_without_a_gpu_pod() -> None:
    world = World(qlorajob({"resources": {"gpuClass": "T4"}, "training": {"maxSequenceLength": 131072}}))
    world.prepare(facts=LLAMA_7B)
    assert world.status.phase is Phase.FAILED
    assert world.reason() == Reason.DOES_NOT_FIT
    assert world.message().startswith("spec.resources.gpuClass: ")
    assert world.live("train") == []
    assert {"Failed", "Stalled", "Finished"} <= world.true()


def test_an_unknown_gpu_class_names_the_known_ones() -> None:
    world = World(qlorajob({"resources": {"gpuClass": "G1000"}}))
    world.prepare()
    assert world.reason() == Reason.UNSUPPORTED
    assert "A100-80GB" in world.message()


# Failure


@pytest.mark.parametrize(
    ("report", "reason", "message"),
    [
        (
            failure("prepare", ExitCode.INVALID, Reason.COLUMN_MISSING, "no column quote", "dataset.columns"),
            "ColumnMissing",
            "spec.dataset.columns: no column quote",
        ),
        (
            failure("prepare", ExitCode.INVALID, Reason.ACCESS_DENIED, "denied", "output.credentialsSecretRef"),
            "AccessDenied",
            "spec.output.credentialsSecretRef: denied",
        ),
        (failure("prepare", ExitCode.INVALID, Reason.INTERNAL_ERROR, ""), "InternalError", "InternalError"),
        (None, "BackoffLimitExceeded", "ended with exit code 64"),
    ],
)
def test_a_failed_prepare_is_failed_and_stalled_with_the_reports_words(
    report: RunReport | None, reason: str, message: str
) -> None:
    world = World()
    world.look()
    world.end("prepare", 64, report)
    world.look()
    assert {"Failed", "Stalled", "Finished"} <= world.true()
    assert not {"Reconciling", "Ready", "Complete"} & world.true()
    assert world.reason() == reason
    assert message in world.message()
    assert world.live("train") == []


def test_a_transient_failure_is_told_while_the_job_retries() -> None:
    world = World()
    world.look()
    world.end("prepare", 66, failure("prepare", ExitCode.TRANSIENT, Reason.ENDPOINT_UNREACHABLE, "no route"))
    world.look()
    assert world.reason() == "EndpointUnreachable"
    assert "no route" in world.message()
    assert "Reconciling" in world.true()


def test_giving_up_says_why_and_after_how_many_tries() -> None:
    world = World()
    world.look()
    report = failure("prepare", ExitCode.TRANSIENT, Reason.ENDPOINT_UNREACHABLE, "no route", "output.endpoint")
    world.end("prepare", 66, report)
    name = next(iter(world.jobs))
    world.add_pod(world.jobs[name])
    world.end("prepare", 66, report)
    world.fail_job(name, "BackoffLimitExceeded")
    world.look()
    assert world.reason() == "EndpointUnreachable"
    assert world.message() == "spec.output.endpoint: no route (gave up after 2 tries)"


def test_a_container_killed_for_memory_names_the_field() -> None:
    world = training()
    world.end("train", 137, None, termination="OOMKilled")
    world.fail_job(world.status.job or "", "BackoffLimitExceeded")
    world.look()
    assert world.reason() == Reason.OUT_OF_MEMORY
    assert "spec.resources.memory" in world.message()


def test_a_crash_without_a_report_shows_the_last_line_of_the_log() -> None:
    world = training()
    world.end("train", 1, None, last_words="Traceback\nValueError: boom\n")
    world.fail_job(world.status.job or "", "BackoffLimitExceeded")
    world.look()
    assert world.message().endswith("exit code 1: ValueError: boom")


def test_running_out_of_gpu_memory_names_the_knobs() -> None:
    world = training()
    world.end("train", 65, failure("train", ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, "tried to allocate 2 GiB"))
    world.look()
    assert world.reason() == Reason.OUT_OF_MEMORY
    assert "training.maxSequenceLength" in world.message()


def test_a_deadline_is_named() -> None:
    world = training({"activeDeadlineSeconds": 60})
    world.fail_job(world.status.job or "", "DeadlineExceeded")
    world.pods.clear()
    world.look()
    assert world.reason() == Reason.DEADLINE_EXCEEDED
    assert "60 seconds" in world.message()


def test_a_failed_merge_keeps_the_adapter() -> None:
    world = trained(MERGE)
    world.end("merge", 64, failure("merge", ExitCode.INVALID, Reason.MODEL_INVALID, "bad"))
    world.look()
    assert world.status.phase is Phase.FAILED
    assert world.status.artifacts is not None
    assert world.status.artifacts.adapter is not None


def test_an_interrupted_pod_isnt_a_failure() -> None:
    world = training()
    world.end("train", 143, failure("train", ExitCode.INTERRUPTED, Reason.INTERRUPTED, "checkpoint 12"))
    world.look()
    assert "Failed" not in world.true()
    assert world.reason() == Reason.INTERRUPTED


def failed() -> World:
    world = World()
    world.look()
    world.end("prepare", 64, failure("prepare", ExitCode.INVALID, Reason.BUCKET_NOT_FOUND, "no bucket", "output.uri"))
    world.look()
    return world


def test_failure_sticks() -> None:
    world = failed()
    before = world.status
    decision = world.look()
    assert (decision.actions, decision.events) == ((), ())
    assert world.status == before


def test_failure_sticks_when_its_children_expire() -> None:
    world = failed()
    world.jobs.clear()
    world.pods.clear()
    assert world.look().actions == ()
    assert world.reason() == Reason.BUCKET_NOT_FOUND


def test_an_edit_tries_again() -> None:
    world = failed()
    world.edit({"backoffLimit": 5})
    world.look()
    assert len(world.live("prepare")) == 1
    assert not {"Failed", "Stalled", "Finished"} & world.true()


def test_a_new_retry_annotation_tries_again_once() -> None:
    world = failed()
    world.edit(annotations={"qlora.dev/retry-at": "1"})
    world.look()
    assert len(world.live("prepare")) == 1
    world.end("prepare", 64, failure("prepare", ExitCode.INVALID, Reason.BUCKET_NOT_FOUND, "no bucket"))
    world.look()
    assert world.look().actions == ()


def test_an_old_retry_annotation_doesnt_retry_a_new_failure() -> None:
    world = World()
    world.edit(annotations={"qlora.dev/retry-at": "1"})
    world.look()
    world.end("prepare", 64, failure("prepare", ExitCode.INVALID, Reason.BUCKET_NOT_FOUND, "no bucket"))
    world.look()
    assert world.look().actions == ()


def test_a_retry_looks_at_the_inputs_again_before_it_trains() -> None:
    world = training()
    world.end("train", 64, failure("train", ExitCode.INVALID, Reason.DATASET_INVALID, "bad row"))
    world.look()
    world.edit(annotations={"qlora.dev/retry-at": "1"})
    world.look()
    assert len(world.live("prepare")) == 1
    assert world.live("train") == []


# Things that wait for somebody


@pytest.mark.parametrize(
    ("reason", "message", "expected", "says"),
    [
        (
            "CreateContainerConfigError",
            'secret "s3-credentials" not found',
            "SecretNotFound",
            "spec.output.credentialsSecretRef: there is no Secret s3-credentials in this namespace",
        ),
        (
            "CreateContainerConfigError",
            "couldn't find key AWS_ACCESS_KEY_ID in Secret team/s3-credentials",
            "SecretNotFound",
            "spec.output.credentialsSecretRef: Secret s3-credentials has no key AWS_ACCESS_KEY_ID",
        ),
        ("ErrImagePull", "no such host", "ImageUnavailable", "no such host"),
        ("ImagePullBackOff", "back-off", "ImageUnavailable", "back-off"),
    ],
)
def test_a_container_that_cant_start_stalls_the_job_until_it_can(
    reason: str, message: str, expected: str, says: str
) -> None:
    world = World()
    world.look()
    world.wait_in("prepare", reason, message)
    world.look()
    assert world.reason() == expected
    assert says in world.message()
    assert "Stalled" in world.true()
    assert not {"Failed", "Finished", "Reconciling"} & world.true()
    world.change("prepare", waiting=None)
    world.run("prepare")
    world.look()
    assert "Stalled" not in world.true()


def test_a_missing_claim_names_its_field() -> None:
    world = World(qlorajob({"model": {"cacheClaim": "weights"}}))
    world.look()
    world.wait_in("prepare", "Unschedulable", 'persistentvolumeclaim "weights" not found', scheduled=False)
    world.look()
    assert world.reason() == Reason.CLAIM_NOT_FOUND
    assert world.message().startswith("spec.model.cacheClaim: ")


def test_a_missing_config_map_is_read_from_the_mounts_warning() -> None:
    world = World(qlorajob({"dataset": {"uri": "configmap://rows/train.jsonl"}}))
    world.look()
    warning = 'MountVolume.SetUp failed for volume "config-1" : configmap "rows" not found'
    world.change("prepare", scheduled=True, warning=warning)
    world.look()
    assert world.reason() == Reason.CONFIG_MAP_NOT_FOUND
    assert world.message() == "spec.dataset.uri: there is no ConfigMap rows in this namespace"


def test_a_pod_without_a_node_shows_the_schedulers_words() -> None:
    world = World()
    world.prepare()
    world.wait_in("train", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", scheduled=False)
    world.look()
    assert world.status.phase is Phase.QUEUED
    assert world.reason() == Reason.UNSCHEDULABLE
    assert "Insufficient nvidia.com/gpu" in world.message()
    assert "Stalled" not in world.true()


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


# Odds and ends


def test_an_object_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    world = training()
    metadata = world.job.metadata.model_copy(update={"deletion_timestamp": world.now})
    world.job = world.job.model_copy(update={"metadata": metadata})
    before = world.status
    assert world.look().actions == ()
    assert world.status == before


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
