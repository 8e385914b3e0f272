"""The columns of `kubectl get qlj` are short and readable."""

from __future__ import annotations

import pytest

from qlorajob.status import Display, Progress
from tests.unit.contract.test_run import PLAN


def test_nothing_is_shown_before_there_is_something() -> None:
    assert Display.of(None, None) == Display()
    assert Display.of(Progress(), None) == Display()


def test_progress_is_shown_in_few_characters() -> None:
    progress = Progress(step=12, total_steps=60, loss=1.23456789, tokens_per_second=1234.5678, eta_seconds=200)

    shown = Display.of(progress, PLAN)

    assert shown == Display(step="12/60", loss="1.235", tokens_per_second="1235", eta="3m20s", gpu="a100-80gb")


def test_several_gpus_are_counted() -> None:
    assert Display.of(None, PLAN.model_copy(update={"gpus": 4})).gpu == "4xa100-80gb"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, None),
        (1, "1s"),
        (59, "59s"),
        (60, "1m"),
        (61, "1m1s"),
        (3600, "1h"),
        (7500, "2h5m"),
        (90_061, "1d1h"),
        (86_400, "1d"),
    ],
)
def test_time_left_is_shown_in_its_two_largest_units(seconds: int, shown: str | None) -> None:
    assert Display.of(Progress(eta_seconds=seconds), None).eta == shown
