"""A pod is killed, deleted, evicted, drained or preempted: the next one goes on from the newest checkpoint."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.chaos.cell import CELL_SECONDS, MOMENTS, SAVE_STEPS, Cell
from tests.chaos.faults import Faults

pytestmark = [pytest.mark.cluster, pytest.mark.long]

STEP = {"preparing": "prepare", "training": "train", "merging": "merge"}
"""Phases with a pod → the step that it does."""


@pytest.mark.parametrize("phase", STEP)
def test_trainer_sigkilled(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        pod = cell.pod_of(STEP[phase])
        faults.trainer_killed(pod)
        cell.until(lambda: _ended(cell, pod.uid), "the pod has ended")
    report = cell.check()
    assert report["training"]["resumedAt"] == ([SAVE_STEPS] if phase == "training" else [])


@pytest.mark.parametrize("phase", STEP)
def test_pod_deleted(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        pod = cell.pod_of(STEP[phase])
        faults.pod_deleted(pod)
        cell.until_asked_to_go([pod])
    _went_on(cell, phase)


@pytest.mark.parametrize("phase", STEP)
def test_pod_evicted(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        pod = cell.pod_of(STEP[phase])
        faults.pod_evicted(pod)
        cell.until_asked_to_go([pod])
    _went_on(cell, phase)


@pytest.mark.parametrize("phase", STEP)
def test_node_drained(cell: Cell, faults: Faults, phase: str) -> None:
    """The operator has to leave, too; both come back when the node does."""
    with ExitStack() as drained, cell.at(phase):
        pod = cell.pod_of(STEP[phase])
        drained.enter_context(faults.node_drained())
        cell.until_asked_to_go([pod])
    _went_on(cell, phase)


@pytest.mark.parametrize("phase", STEP)
def test_kubelet_stopped_and_started(cell: Cell, faults: Faults, phase: str) -> None:
    """What the pod does meanwhile is told when the kubelet is back."""
    with ExitStack() as stopped, cell.at(phase):
        stopped.enter_context(faults.kubelet_stopped())
    cell.check()


@pytest.mark.parametrize("phase", ["queued", "training"])
def test_job_suspended_and_resumed_by_the_queue(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at("queued"):
        pass
    if phase == "queued":  # preempted before its pod has begun
        faults.job_suspended(cell.job_of("train"))
    else:
        with cell.storage.holding(MOMENTS["training"]) as arrived:
            assert arrived.wait(CELL_SECONDS)
            pod = cell.pod_of("train")
            faults.job_suspended(cell.job_of("train"))
            cell.until_asked_to_go([pod])
    cell.until_phase("queued")
    cell.until(lambda: not cell.live_pods("train"), "the pod has made room")
    cell.admit()
    _went_on(cell, phase)


def _ended(cell: Cell, uid: str) -> bool:
    return any(pod.uid == uid and not pod.live for step in STEP.values() for pod in cell.pods(step))


def _went_on(cell: Cell, phase: str) -> None:
    """No step was done twice: the checkpoint that the pod wrote when it was asked to stop is where the next began."""
    resumed_at = cell.check()["training"]["resumedAt"]
    if phase != "training":
        assert resumed_at == []
        return
    stopped = next(pod.report for pod in cell.pods("train") if pod.report)
    assert stopped.progress is not None
    assert resumed_at == [stopped.progress.step]
