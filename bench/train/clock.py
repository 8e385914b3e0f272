"""Times of steps, taken by the GPU itself: asking for them waits for nothing."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Marks each step's end, and collects the losses."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._marks: list[Any] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark, once the warm-up is over."""
        if state.global_step == self._warmup:
            torch.cuda.synchronize()
        if state.global_step >= self._warmup:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def seconds(self) -> list[float]:
        """Of each step after the warm-up."""
        torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def median(self) -> float:
        """Median step, in seconds."""
        return statistics.median(self.seconds())
