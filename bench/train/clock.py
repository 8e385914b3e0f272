"""Times of steps, taken by the GPU itself: asking for them waits for nothing. On a CPU, by its clock."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Marks each step's end, and collects the losses. Without a warm-up the first step counts from its beginning."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._marks: list[Any] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark, where there is no warm-up."""
        if self._warmup == 0:
            self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark, once the warm-up is over."""
        if state.global_step == self._warmup and torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step >= self._warmup:
            self._mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def seconds(self) -> list[float]:
        """Of each step after the warm-up."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not torch.cuda.is_available():
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def median(self) -> float:
        """Median step, in seconds."""
        return statistics.median(self.seconds())

    def _mark(self) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        self._marks.append(mark)
