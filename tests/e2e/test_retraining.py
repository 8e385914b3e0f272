"""Which edits start a new run, which don't, and what happens to a run that is edited or deleted under way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.verify import list_keys
from tests.e2e.conftest import BUCKET, tiny_manifest
from tests.support import tiny
from tests.support.live import Manifest, Namespace, eventually

LONG = {"training": {"maxSteps": 5000, "saveSteps": 0}}


V1 = {"dataset": {"uri": f"s3://{BUCKET}/v1"}}
V2 = {"dataset": {"uri": f"s3://{BUCKET}/v2"}}
FIRST: dict[str, Manifest] = {"edited": {}, "same": V1}


@pytest.fixture(scope="module")
def first_runs(namespace: Namespace, s3: Any, tiny_inputs: Path) -> dict[str, Manifest]:
    """Statuses of finished jobs, which the tests edit. They run side by side, so that the node is never idle."""
    s3.put_object(Bucket=BUCKET, Key="v1/rows.jsonl", Body=tiny.jsonl())
    for name, spec in FIRST.items():
        namespace.apply(tiny_manifest(namespace, name, spec))
    return {name: namespace.wait(name, "Complete") for name in FIRST}


@pytest.fixture
def started(namespace: Namespace, manifest: Callable[..., Manifest]) -> Callable[[str], Manifest]:
    """Start a run that wouldn't end by itself within the test, and wait until it trains."""

    def start(name: str) -> Manifest:
        made = manifest(name, LONG)
        namespace.apply(made)
        namespace.wait_for(name, "{.status.phase}=Training")
        eventually(lambda: namespace.status(name).get("progress", {}).get("step"), 120, "the first step")
        return made

    return start


def test_a_result_field_starts_a_new_run_and_keeps_the_old_ones_artifacts(
    namespace: Namespace, manifest: Callable[..., Manifest], first_runs: dict[str, Manifest], s3: Any
) -> None:
    first = first_runs["edited"]
    namespace.apply(manifest("edited", {"training": {"learningRate": 1e-3}}))
    namespace.wait_for("edited", "{.status.observedGeneration}=2")
    second = namespace.wait("edited", "Complete")
    assert second["run"]["id"] != first["run"]["id"]
    assert [entry["id"] for entry in second["history"]] == [first["run"]["id"]]
    assert second["history"][0]["outcome"] == "Succeeded"
    for status in (first, second):
        prefix = f"{namespace.name}/edited/{status['run']['id']}/"
        assert f"{prefix}manifest.json" in list_keys(s3, BUCKET, prefix)


def test_a_field_that_leaves_the_result_alone_starts_nothing(
    namespace: Namespace, manifest: Callable[..., Manifest], first_runs: dict[str, Manifest]
) -> None:
    first = first_runs["same"]
    jobs = {job["metadata"]["name"] for job in namespace.jobs("same")}
    kept = {"ttlSecondsAfterFinished": 3600, "training": {"microBatchSize": 1}}
    namespace.apply(manifest("same", V1 | kept))
    status = namespace.wait_for("same", "{.status.observedGeneration}=2")
    assert status["phase"] == "Succeeded"
    assert status["run"]["id"] == first["run"]["id"]
    assert {job["metadata"]["name"] for job in namespace.jobs("same")} == jobs


def test_merging_can_be_asked_for_afterwards_without_training_again(
    namespace: Namespace, manifest: Callable[..., Manifest], first_runs: dict[str, Manifest]
) -> None:
    first = first_runs["same"]
    namespace.apply(manifest("same", V1 | {"merge": {"enabled": True}}))
    status = namespace.wait_for("same", "{.status.artifacts.merged.uri}")
    namespace.wait("same", "Complete")
    assert status["run"]["id"] == first["run"]["id"]
    assert len(namespace.jobs("same", "train")) == 1


def test_a_new_revision_of_the_data_starts_a_new_run(
    namespace: Namespace, manifest: Callable[..., Manifest], first_runs: dict[str, Manifest], s3: Any
) -> None:
    more = tiny.jsonl() + tiny.jsonl().splitlines(keepends=True)[0]
    s3.put_object(Bucket=BUCKET, Key="v2/rows.jsonl", Body=more)
    namespace.apply(manifest("same", V2))
    namespace.wait_for("same", f"{{.status.observedGeneration}}={namespace.job('same')['metadata']['generation']}")
    assert namespace.wait("same", "Complete")["run"]["id"] != first_runs["same"]["run"]["id"]


def test_an_edit_while_training_replaces_the_run(
    namespace: Namespace, manifest: Callable[..., Manifest], started: Callable[[str], Manifest]
) -> None:
    started("replaced")
    old = namespace.status("replaced")["run"]["id"]
    namespace.apply(manifest("replaced"))
    status = namespace.wait("replaced", "Complete")
    assert status["run"]["id"] != old
    assert [(entry["id"], entry["outcome"]) for entry in status["history"]] == [(old, "Replaced")]
    assert len(namespace.jobs("replaced", "train")) == 1


def test_deleting_the_job_while_training_leaves_no_orphan(
    namespace: Namespace, started: Callable[[str], Manifest]
) -> None:
    started("deleted")
    namespace.kubectl("delete", "qlj", "deleted", "--wait")
    namespace.kubectl("wait", "pod", "-l", "qlora.dev/job=deleted", "--for=delete", "--timeout=150s")
    eventually(lambda: not namespace.jobs("deleted"), 30, "no Job is left")
    assert namespace.pods("deleted") == []


def test_suspending_saves_a_checkpoint_and_resuming_goes_on_from_it(
    namespace: Namespace, manifest: Callable[..., Manifest], started: Callable[[str], Manifest]
) -> None:
    made = started("paused")
    made["spec"]["suspend"] = True
    namespace.apply(made)
    namespace.wait("paused", "Suspended")
    namespace.kubectl(
        "wait", "pod", "-l", "qlora.dev/job=paused,qlora.dev/step=train", "--for=delete", "--timeout=150s"
    )
    assert namespace.status("paused")["phase"] == "Suspended"
    reached = namespace.status("paused")["progress"]["step"]
    made["spec"]["suspend"] = False
    namespace.apply(made)
    namespace.wait_for("paused", "{.status.phase}=Training")
    eventually(
        lambda: namespace.status("paused")["progress"]["step"] > reached, 120, f"training goes on after step {reached}"
    )
    pods = namespace.pods("paused", "train")
    logs = namespace.kubectl("logs", pods[0]["metadata"]["name"])
    assert "resum" in logs.lower()
    namespace.kubectl("delete", "qlj", "paused", "--wait")


def test_killing_the_operator_at_any_moment_trains_once(
    namespace: Namespace, manifest: Callable[..., Manifest]
) -> None:
    namespace.apply(manifest("survivor", {"merge": {"enabled": True}}))
    kill = ("-n", namespace.cluster.target.operator_namespace, "delete", "pod", "--all", "--grace-period=0", "--force")
    for phase in ("Preparing", "Training", "Merging"):
        namespace.wait_for("survivor", f"{{.status.phase}}={phase}")
        namespace.cluster.kubectl(*kill)
    namespace.wait("survivor", "Complete")
    namespace.cluster.kubectl(*kill)
    deployment = ("-n", namespace.cluster.target.operator_namespace, "rollout", "status", "deployment/qlora-operator")
    namespace.cluster.kubectl(*deployment)
    for step in ("prepare", "train", "merge"):
        assert len(namespace.jobs("survivor", step)) == 1
    assert namespace.status("survivor")["phase"] == "Succeeded"
