"""The user changes, deletes or re-creates the job under way: only what changes the result is done anew."""

from __future__ import annotations

import pytest

from tests.chaos.cell import PHASES, Cell
from tests.chaos.ledger import LEDGER

pytestmark = [pytest.mark.cluster, pytest.mark.long]


@pytest.mark.parametrize("phase", PHASES)
def test_a_field_of_the_result_edited(cell: Cell, phase: str) -> None:
    """The run makes way for another. One that was trained keeps its adapter."""
    with cell.at(phase):
        LEDGER.faults += 1
        before, pods = cell.status.get("run"), cell.live_pods()
        cell.apply({"training": {"learningRate": 1e-3}})
        cell.until_seen(2)
        cell.until_asked_to_go(pods)  # else it may still end what it is at
    trained = phase == "merging"
    cell.check(runs=2 if trained else 1, tried=1)
    filed = [(run["id"], run["outcome"]) for run in cell.ended.get("history", [])]
    assert filed == ([(before["id"], "Succeeded" if trained else "Replaced")] if before else [])


@pytest.mark.parametrize("phase", PHASES)
def test_a_field_that_is_none_of_the_result_edited(cell: Cell, phase: str) -> None:
    with cell.at(phase):
        LEDGER.faults += 1
        cell.apply({"ttlSecondsAfterFinished": 3600, "backoffLimit": 5})
        cell.until_seen(2)
    cell.check()
    assert len(_training_jobs(cell)) == 1


@pytest.mark.parametrize("phase", PHASES)
def test_job_deleted_and_created_again(cell: Cell, phase: str) -> None:
    """Its successor goes on with the same run: from its checkpoints, or from its adapter."""
    with cell.at(phase):
        _create_again(cell)
    cell.check()


def test_done_job_deleted_and_created_again(cell: Cell) -> None:
    """As by a cluster that is built anew: nothing is trained again."""
    cell.apply()
    cell.until_condition("Complete")
    before = _training_jobs(cell)
    _create_again(cell)
    cell.check()
    assert _training_jobs(cell) == before


def _create_again(cell: Cell) -> None:
    LEDGER.faults += 1
    before, pods = cell.job, cell.live_pods()
    assert before is not None
    cell.delete()
    cell.until_gone(before.uid)
    cell.until_asked_to_go(pods)
    cell.apply()


def _training_jobs(cell: Cell) -> set[str]:
    """Uids of all that there ever were."""
    return {version.uid for version in cell.story() if version.kind == "Job" and version.step == "train"}
