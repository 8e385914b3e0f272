"""The witness finds the lies that it looks for: else its silence would prove nothing. Needs no cluster."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.chaos import truth
from tests.chaos.history import Version

TIME = "2026-09-21T13:33:20+00:00"
BEGAN = datetime.fromisoformat(TIME).timestamp()
RUN = "0123456789abcdef"


def qlorajob(phase: str, *true: str, at: float = BEGAN, generation: int = 1, **status: Any) -> Version:
    conditions = [{"type": kind, "status": "True"} for kind in true]
    metadata = {"name": "job", "uid": "u", "resourceVersion": "7", "generation": generation}
    status = {"phase": phase, "observedGeneration": generation, "conditions": conditions} | status
    return Version(at, "QLoRAJob", {"metadata": metadata, "spec": {"merge": {"enabled": False}}, "status": status})


def done(*, published: bool = True, **status: Any) -> Version:
    raw = qlorajob("Succeeded", "Ready", "Complete", **{"artifacts": {"adapter": {}}} | status).raw
    return Version(BEGAN, "QLoRAJob", raw, published=published)


def child(kind: str, uid: str, *, gone: bool = False, **status: Any) -> Version:
    labels = {"qlora.dev/job": "job", "qlora.dev/step": "train", "qlora.dev/run": RUN}
    metadata = {"name": f"train-{uid}", "uid": uid, "labels": labels}
    return Version(BEGAN, kind, {"metadata": metadata, "spec": {}, "status": status}, gone=gone)


def running(uid: str) -> Version:
    container = {"name": "trainer", "state": {"running": {"startedAt": TIME}}}
    return child("Pod", uid, phase="Running", containerStatuses=[container])


COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}]}
TRUE = (
    qlorajob("Preparing"),
    child("Job", "a"),
    running("a"),
    qlorajob("Training"),
    child("Job", "a", gone=True),
    child("Pod", "a", phase="Failed"),
    child("Job", "b"),
    running("b"),
    child("Job", "b", **COMPLETE),
    done(),
    qlorajob("Preparing", generation=2),
)


def test_a_history_in_which_a_run_is_repeated_and_edited_is_true() -> None:
    assert truth.lies(TRUE) == []


@pytest.mark.parametrize(
    ("story", "words"),
    [
        ([done(), qlorajob("Training")], "a step back from Succeeded"),
        ([done(artifacts={})], "no adapter"),
        ([done(published=False)], "no manifest in S3"),
        ([qlorajob("Failed", "Failed", "Complete")], "Complete and Failed at once"),
        ([qlorajob("Training", "Ready")], "Ready is True"),
        ([qlorajob("Training", at=BEGAN - 60), running("a")], "no training pod had started"),
        ([qlorajob("Training")], "no training pod had started"),
        ([child("Job", "a"), child("Job", "b")], "2 live training Jobs"),
        ([running("a"), running("b")], "2 running training pods"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lie_is_found(story: list[Version], words: str) -> None:
    assert any(words in lie for lie in truth.lies(story))


def test_the_timeline_tells_each_change_once() -> None:
    lines = truth.timeline([*TRUE[:3], TRUE[2], *TRUE[3:6]]).splitlines()
    assert [line.split("  ", 3)[3].strip() for line in lines] == [
        "job  Preparing, step None",
        "train-a  active",
        "train-a  Running",
        "job  Training, step None",
        "train-a  active, gone",
        "train-a  Failed",
    ]


def test_a_run_that_is_trained_twice_is_found() -> None:
    report = '{"step": "train", "exitCode": 0, "reason": "Succeeded"}'
    ended = {"name": "trainer", "state": {"terminated": {"exitCode": 0, "message": report}}}
    pods = [child("Pod", uid, phase="Succeeded", containerStatuses=[ended]) for uid in "ab"]
    assert truth.trainings(pods) == {RUN: 2}
