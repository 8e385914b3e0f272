"""The control plane goes away and comes back, and everything goes on from where it was."""

from __future__ import annotations

import pytest

from tests.chaos.cell import PHASES, Cell
from tests.chaos.faults import Faults

pytestmark = pytest.mark.cluster
ETCD_SECONDS = 30.0


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_api_server_restarted(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        faults.api_server_restarted()
    cell.check()


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_etcd_paused(cell: Cell, faults: Faults, phase: str) -> None:
    with cell.at(phase):
        faults.etcd_paused(ETCD_SECONDS)
    cell.check()
