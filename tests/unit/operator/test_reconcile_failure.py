"""reconcile on failures: each is told once, with what to do, and sticks until something changes."""

from __future__ import annotations

import pytest

from qlora_operator.fleet import Fleet
from qlora_vram.gpus import GpuClass
from qlorajob.errors import ExitCode, Reason
from qlorajob.run import RunReport
from qlorajob.status import Phase
from tests.support.reports import LLAMA_7B, failure
from tests.unit.operator.world import World, qlorajob, trained, training

MERGE = {"merge": {"enabled": True}}


# Plans that can't be


def test_a_model_that_fits_no_gpu_is_stalled_without_a_gpu_pod() -> None:
    world = World(qlorajob({"resources": {"gpuClass": "T4"}, "training": {"maxSequenceLength": 131072}}))
    world.prepare(facts=LLAMA_7B)
    assert world.status.phase is Phase.PENDING
    assert world.reason() == Reason.DOES_NOT_FIT
    assert world.message().startswith("spec.resources.gpuClass: ")
    assert world.live("train") == []
    assert "Stalled" in world.true()
    assert not {"Failed", "Finished", "Reconciling"} & world.true()


def test_a_model_that_fits_no_gpu_trains_once_a_larger_one_is_there() -> None:
    world = World(qlorajob({"resources": {"gpuClass": "auto"}, "training": {"maxSequenceLength": 8192}}))
    world.fleet = Fleet(values=(GpuClass(name="L4", memory_mib=22487),))
    world.prepare(facts=LLAMA_7B.model_copy(update={"parameters": 70_000_000_000, "layers": 80, "hidden_size": 8192}))
    assert world.reason() == Reason.DOES_NOT_FIT
    assert "L4" in world.message()
    world.fleet = Fleet(values=(*world.fleet.values, GpuClass(name="B200", memory_mib=182642)))
    world.look()
    assert [view.step for view in world.live("train")] == ["train"]
    assert world.status.plan
    assert world.status.plan.gpu_class == "B200"


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


@pytest.mark.parametrize(
    "said",
    [
        'Usage of EmptyDir volume "work" exceeds the limit "8Gi". ',
        "Pod ephemeral local storage usage exceeds the total limit of containers 8Gi. ",
        'Container trainer exceeded its local ephemeral storage limit "8Gi". ',
    ],
)
def test_a_pod_that_overran_its_own_disk_isnt_started_again_and_again(said: str) -> None:
    """The kubelet sends it a SIGTERM, and exit code 143 is no failure to the Job."""
    world = training()
    interrupted = failure("train", ExitCode.INTERRUPTED, Reason.INTERRUPTED, "train was asked to stop")
    world.end("train", 143, interrupted, verdict=f"Evicted: {said}")
    world.look()
    assert (world.status.phase, world.reason()) == (Phase.FAILED, Reason.DISK_FULL)
    assert said.strip().rstrip(".") in world.message()
    assert "spec.resources.ephemeralStorage" in world.message()
    assert not world.live("train")


def test_a_pod_that_a_node_without_room_evicted_is_tried_again_and_says_why() -> None:
    world = training()
    world.end("train", 137, None, verdict="Evicted: The node was low on resource: memory. ")
    world.look()
    assert "Failed" not in world.true()
    assert "The node was low on resource: memory" in world.message()


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
