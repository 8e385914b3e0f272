"""The operator dies, changes, is there twice or is cut off: everything goes on, once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.cell import PHASES, Cell
from tests.chaos.faults import Faults

pytestmark = pytest.mark.cluster
GRACE = "terminationGracePeriodSeconds: 120"


@pytest.mark.long  # make test kills it at every phase of one job: tests/e2e/test_retraining.py
@pytest.mark.parametrize("phase", PHASES)
def test_operator_sigkilled(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        faults.operator_killed()
    cell.check()


@pytest.mark.long
def test_operator_sigkilled_after_the_end(cell: Cell, faults: Faults) -> None:
    """A done run stays done: the new operator neither repeats it nor says that it isn't."""
    cell.apply()
    cell.until_condition("Complete")
    before = cell.job
    faults.operator_killed()
    faults.until_the_operator_works()
    assert cell.job == before
    cell.check()


@pytest.fixture
def other_config(faults: Faults) -> Iterator[str]:
    """Settings under which the operator makes other pods. Those of before come back afterwards."""
    before = faults.operator_config()
    assert GRACE in before
    yield before.replace(GRACE, "terminationGracePeriodSeconds: 60")
    faults.set_operator_config(before)


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_operator_rolled_to_a_new_version(cell: Cell, faults: Faults, phase: str, other_config: str) -> None:
    with cell.at(phase):
        faults.operator_rolled(other_config)
    cell.check()


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_operator_loses_its_watches(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        faults.watches_cut()
    cell.check()


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_two_operators_of_which_the_leader_dies(cell: Cell, faults: Faults, phase: str) -> None:
    with faults.two_operators():
        with cell.at(phase):
            leader = faults.leader()
            faults.operator_killed()
        cell.check()
        assert faults.leader() not in ("", leader)
