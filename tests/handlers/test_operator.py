"""The real operator process against the real API server and Job controller, with the chart's rights and no more."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from typing import Any

import pytest

from qlora_operator.api import Api
from qlora_operator.store import Kind, Present
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import prepare_key
from qlorajob.resource import parse
from tests.handlers.stage import Json, Stage
from tests.support.reports import adapter, failure, merge_report, prepare_report, train_report


def key_of(stage: Stage, name: str) -> str:
    return prepare_key(parse(stage.get("qlj", name)).spec)


def prepare(stage: Stage, name: str, run_id: str = "run1", **fields: Any) -> None:
    stage.finish(stage.pod(name, "prepare"), prepare_report(key_of(stage, name), run_id, **fields))


def train(stage: Stage, name: str, run_id: str = "run1") -> None:
    pod = stage.pod(name, "train")
    stage.run(pod)
    stage.phase(name, "Training")
    stage.finish(pod, train_report(run_id))


def live(jobs: list[Json]) -> list[Json]:
    return [job for job in jobs if not job.get("status", {}).get("conditions")]


def test_one_manifest_goes_from_prepare_to_merged(stage: Stage) -> None:
    stage.apply("whole", merge={"enabled": True})
    stage.phase("whole", "Pending")
    prepare(stage, "whole")
    stage.phase("whole", "Queued")
    train(stage, "whole")
    stage.phase("whole", "Merging")
    stage.finish(stage.pod("whole", "merge"), merge_report())
    status = stage.phase("whole", "Succeeded")
    assert set(status["artifacts"]) == {"adapter", "report", "merged"}
    assert status["display"]["step"] == "60/60"
    stage.kubectl("wait", "qlj/whole", "--for=condition=Complete", "--timeout=1s")
    assert {"Preparing", "Planned", "Queued", "Training", "Trained", "Merged", "Succeeded"} <= set(
        stage.events("whole")
    )


def test_kopf_leaves_no_trace_in_the_object(stage: Stage) -> None:
    stage.apply("untouched")
    stage.phase("untouched", "Pending")
    metadata = stage.get("qlj", "untouched")["metadata"]
    assert "finalizers" not in metadata
    assert set(metadata.get("annotations", {})) <= {"kubectl.kubernetes.io/last-applied-configuration"}


def test_a_killed_operator_never_trains_twice(stage: Stage) -> None:
    stage.apply("killed")
    prepare(stage, "killed")
    pod = stage.pod("killed", "train")
    stage.run(pod)
    stage.phase("killed", "Training")
    stage.operator.kill()
    stage.finish(pod, train_report())  # while nobody looks
    stage.operator.start()
    stage.phase("killed", "Succeeded")
    assert len(stage.jobs("killed", "train")) == 1


def test_an_operator_killed_at_any_moment_makes_one_training_job(stage: Stage) -> None:
    for number in range(4):
        name = f"anytime-{number}"
        stage.apply(name)
        pod = stage.pod(name, "prepare")
        stage.finish(pod, prepare_report(key_of(stage, name), f"run-{number}"))
        time.sleep(number * 0.15)
        stage.operator.kill()
        stage.operator.start()
        stage.pod(name, "train")
        assert len(stage.jobs(name, "train")) == 1, name


def test_a_changed_learning_rate_replaces_the_run(stage: Stage) -> None:
    stage.apply("edited")
    prepare(stage, "edited", "old")
    stage.run(stage.pod("edited", "train"))
    stage.phase("edited", "Training")
    stage.apply("edited", training={"learningRate": 1e-5})
    prepare(stage, "edited", "new")
    status = stage.phase("edited", "Queued")
    assert [(entry["id"], entry["outcome"]) for entry in status["history"]] == [("old", "Replaced")]
    stage.until(lambda: len(live(stage.jobs("edited", "train"))) == 1, "one live training Job")


def test_a_changed_ttl_leaves_the_run_alone(stage: Stage) -> None:
    stage.apply("ttl")
    prepare(stage, "ttl")
    stage.run(stage.pod("ttl", "train"))
    before = stage.phase("ttl", "Training")["job"]
    stage.apply("ttl", ttlSecondsAfterFinished=600)
    generation = stage.get("qlj", "ttl")["metadata"]["generation"]
    stage.until(lambda: stage.status("ttl")["observedGeneration"] == generation, "the edit is seen")
    assert stage.status("ttl")["job"] == before


def test_suspend_ends_the_pod_and_resume_goes_on(stage: Stage) -> None:
    stage.apply("paused")
    prepare(stage, "paused")
    stage.run(stage.pod("paused", "train"))
    stage.phase("paused", "Training")
    stage.apply("paused", suspend=True)
    stage.phase("paused", "Suspended")
    stage.until(lambda: not stage.jobs("paused", "train"), "the training Job is gone")
    stage.apply("paused", suspend=False)
    train(stage, "paused")
    status = stage.phase("paused", "Succeeded")
    assert status["run"]["attempt"] == 2


def test_a_recreated_object_finds_its_finished_run(stage: Stage) -> None:
    stage.apply("again")
    prepare(stage, "again")
    train(stage, "again")
    stage.phase("again", "Succeeded")
    stage.kubectl("delete", "qlj", "again")
    stage.until(lambda: not stage.jobs("again", "prepare"), "the old Jobs are collected")
    stage.apply("again")
    prepare(stage, "again", artifacts=adapter("run1"))
    stage.phase("again", "Succeeded")
    assert stage.jobs("again", "train") == []
    assert stage.condition("again", "Complete")["reason"] == "AlreadyTrained"


def test_deleting_the_object_leaves_no_orphan(stage: Stage) -> None:
    stage.apply("gone")
    prepare(stage, "gone")
    stage.run(stage.pod("gone", "train"))
    stage.phase("gone", "Training")
    stage.kubectl("delete", "qlj", "gone")
    stage.until(lambda: not stage.get("jobs,pods", "-l", "qlora.dev/job=gone")["items"], "no Job and no pod")


def test_invalid_input_stalls_with_the_field_and_no_training_job(stage: Stage) -> None:
    stage.apply("invalid")
    report = failure("prepare", ExitCode.INVALID, Reason.COLUMN_MISSING, "no column quote", "dataset.columns")
    stage.finish(stage.pod("invalid", "prepare"), report)
    stage.phase("invalid", "Failed")
    stalled = stage.condition("invalid", "Stalled")
    assert (stalled["status"], stalled["reason"], stalled["message"]) == (
        "True",
        "ColumnMissing",
        "spec.dataset.columns: no column quote",
    )
    assert stage.jobs("invalid", "train") == []


def test_the_retry_annotation_tries_again(stage: Stage) -> None:
    stage.apply("retried")
    report = failure("prepare", ExitCode.INVALID, Reason.BUCKET_NOT_FOUND, "no bucket", "output.uri")
    stage.finish(stage.pod("retried", "prepare"), report)
    stage.phase("retried", "Failed")
    stage.kubectl("annotate", "qlj", "retried", "qlora.dev/retry-at=now")
    stage.phase("retried", "Pending")
    assert len(stage.jobs("retried", "prepare")) == 2


def test_a_missing_secret_stalls_until_it_is_there(stage: Stage) -> None:
    stage.apply("secretless")
    pod = stage.pod("secretless", "prepare")
    stage.wait_in(pod, "CreateContainerConfigError", 'secret "s3-credentials" not found')
    stage.until(lambda: stage.condition("secretless", "Stalled").get("reason") == "SecretNotFound", "it stalls")
    assert stage.condition("secretless", "Stalled")["message"].startswith("spec.output.credentialsSecretRef: ")
    stage.run(pod)
    stage.until(lambda: not stage.condition("secretless", "Stalled"), "it goes on")


def test_a_job_that_cannot_make_pods_says_why(stage: Stage) -> None:
    stage.apply("no-account", serviceAccountName="nobody")
    stage.until(lambda: stage.condition("no-account", "Stalled").get("reason") == "PodCreationFailed", "it stalls")
    assert 'serviceaccount "nobody" not found' in stage.condition("no-account", "Stalled")["message"]


def test_a_queued_job_is_created_suspended(stage: Stage) -> None:
    stage.apply("queued", queueName="team-a")
    prepare(stage, "queued")
    stage.until(lambda: stage.jobs("queued", "train"), "the training Job")
    job = stage.jobs("queued", "train")[0]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert "queue team-a" in stage.until(lambda: stage.condition("queued", "Ready").get("message", ""), "the condition")


def test_metrics_count_jobs_by_phase(stage: Stage) -> None:
    stage.apply("counted")
    stage.phase("counted", "Pending")
    with urllib.request.urlopen("http://127.0.0.1:9401/metrics") as response:
        text = response.read().decode()
    assert f'qlora_jobs{{namespace="{stage.name}",phase="Pending"}}' in text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_log_names_the_object(stage: Stage) -> None:
    stage.apply("logged")
    stage.phase("logged", "Pending")
    lines = [json.loads(line) for line in stage.operator.log.read_text().splitlines() if line.startswith("{")]
    assert f"{stage.name}/logged" in {line.get("key") for line in lines}


def test_what_the_indexes_are_held_against_is_what_is_there(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.apply("listed")
    stage.pod("listed", "prepare")
    where = "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"  # read from $KUBECONFIG once
    monkeypatch.setattr(where, str(stage.operator.kubeconfig))
    kinds: tuple[Kind, ...] = ("qlorajobs", "jobs", "pods")

    async def present() -> dict[Kind, Present]:
        api = await Api.connect()
        try:
            return {kind: await api.present(kind, stage.name) for kind in kinds}
        finally:
            await api.close()

    for kind, found in asyncio.run(present()).items():
        there = stage.get(kind)["items"]
        assert found.uids == {item["metadata"]["uid"] for item in there}
        assert not any(found.lacks(item) for item in there)
        assert Present(found.version, frozenset()).lacks(there[0])


def test_no_request_of_the_operator_was_forbidden(stage: Stage) -> None:
    assert "is forbidden: User" not in stage.operator.log.read_text()
