"""What a person sees while a run goes on."""

from __future__ import annotations

import io

from rich.console import Console

from qlora_cli.display import ProgressDisplay, bar, describe
from qlorajob.status import Progress


def test_nothing_is_said_about_what_is_not_known() -> None:
    assert describe(Progress()) == ""


def test_loss_speed_and_time_left_are_said() -> None:
    progress = Progress(loss=2.3456, tokens_per_second=1234.5, eta_seconds=65)
    assert describe(progress) == "loss 2.346 · 1,234 tok/s · ETA 1:05"


def test_hours_are_told_from_minutes() -> None:
    assert describe(Progress(eta_seconds=2 * 3600 + 3 * 60 + 4)) == "ETA 2:03:04"


def test_the_bar_is_full_at_the_last_step_only() -> None:
    assert bar(Progress(step=59, total_steps=60), width=10) == "█████████·"
    assert bar(Progress(step=60, total_steps=60), width=10) == "██████████"


def test_the_bar_is_empty_before_the_number_of_steps_is_known() -> None:
    assert bar(Progress(), width=4) == "····"


def test_without_a_terminal_each_step_is_one_line() -> None:
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, width=200)) as display:
        for step in (1, 1, 2):
            display.update("Training", Progress(step=step, total_steps=2, loss=1.0))
    lines = output.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/2", "2/2"]
