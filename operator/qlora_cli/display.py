"""Progress of a run for people: a live bar on a terminal, a line for each step where output is a file or CI."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlorajob.status import Progress

BAR_WIDTH = 30


def describe(progress: Progress) -> str:
    """Loss, speed and time left, as far as they are known: `loss 2.314 · 412 tok/s · ETA 0:48`."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.eval_loss is not None:
        parts.append(f"validation {progress.eval_loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.eta_seconds is not None:
        minutes, seconds = divmod(progress.eta_seconds, 60)
        hours, minutes = divmod(minutes, 60)
        parts.append(f"ETA {f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02}")
    return " · ".join(parts)


def bar(progress: Progress, width: int = BAR_WIDTH) -> str:
    """A bar of `width` characters that is full at the last step."""
    done = width * progress.step // progress.total_steps if progress.total_steps else 0
    return "█" * done + "·" * (width - done)


class ProgressDisplay:
    """Shows a phase, messages and training progress. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = Live(console=self.console, refresh_per_second=8) if self.console.is_terminal else None
        self._shown: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, message: str, *, style: str = "") -> None:
        """Print one line above the bar."""
        self.console.print(Text(message, style=style), soft_wrap=True)

    def update(self, phase: str, progress: Progress | None) -> None:
        """Show where the run is. Without a terminal, a line only when phase or step has changed."""
        if self._live:
            self._live.update(self._render(phase, progress))
        elif progress and progress.total_steps and self._shown != (phase, progress.step):
            self._shown = (phase, progress.step)
            counter = f"{progress.step:>{len(str(progress.total_steps))}}/{progress.total_steps}"
            self.say(f"{phase:<9} {bar(progress)} {counter}  {describe(progress)}")

    @staticmethod
    def _render(phase: str, progress: Progress | None) -> Table:
        grid = Table.grid(padding=(0, 1))
        if progress is None or not progress.total_steps:
            grid.add_row(Text(f"{phase} …", style="bold"))
        else:
            grid.add_row(
                Text(phase, style="bold"),
                ProgressBar(total=progress.total_steps, completed=progress.step, width=BAR_WIDTH),
                f"{progress.step}/{progress.total_steps}",
                describe(progress),
            )
        return grid
