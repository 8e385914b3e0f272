"""What happens beside the training loop: progress out, checkpoints to storage, and stopping when asked to."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from qlora_trainer.hardware import Hardware, peak_memory
from qlora_trainer.journal import Journal
from qlora_trainer.metrics import Telemetry
from qlora_trainer.model import require_numbers
from qlora_trainer.paging import restore_pages
from qlora_trainer.signals import StopSignal
from qlora_trainer.uploads import CheckpointUploads

logger = logging.getLogger(__name__)

RECENT_STEPS = 20
"""Steps that speed and remaining time are taken from."""


class _Timing(NamedTuple):
    seconds: float
    tokens: int


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps Telemetry up to date, step by step. Time for checkpoints and evaluation isn't counted as training."""

    def __init__(
        self,
        telemetry: Telemetry,
        journal: Journal,
        hardware: Hardware,
        *,
        predicted_bytes: int,
        tokens_seen: Callable[[], int],
        samples_per_step: float,
    ) -> None:
        self._telemetry, self._journal, self._hardware = telemetry, journal, hardware
        self._predicted = predicted_bytes
        self._tokens_seen = tokens_seen
        self._samples_per_step = samples_per_step
        self._recent: deque[_Timing] = deque(maxlen=RECENT_STEPS)
        self._began, self._tokens_before = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began, self._tokens_before = time.monotonic(), self._tokens_seen()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Say how far it is and how fast."""
        timing = _Timing(time.monotonic() - self._began, self._tokens_seen() - self._tokens_before)
        self._recent.append(timing)
        self._journal.train_seconds += timing.seconds
        self._journal.train_tokens += timing.tokens
        seconds = sum(step.seconds for step in self._recent)
        per_step = seconds / len(self._recent)
        self._telemetry.speed(step_seconds=per_step, samples_per_second=self._samples_per_step / per_step)
        self._telemetry.advance(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(float(state.epoch or 0), 4),
            tokens_per_second=round(sum(step.tokens for step in self._recent) / seconds, 1),
            eta_seconds=round(per_step * (state.max_steps - state.global_step)),
        )
        if self._hardware.on_gpu:
            self._telemetry.gpu_memory(
                allocated=torch.cuda.memory_allocated(),
                reserved=torch.cuda.memory_reserved(),
                peak=peak_memory(self._hardware),
                predicted=self._predicted,
            )
        if state.global_step >= state.max_steps:
            control.should_log = True  # or the loss that the run ends with would be one of many steps before
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Pass losses on."""
        logs = logs or {}
        if "loss" in logs:
            first = self._telemetry.progress.first_loss
            self._telemetry.advance(loss=logs["loss"], first_loss=logs["loss"] if first is None else first)
            self._journal.curve.append(
                {
                    "step": state.global_step,
                    "time": time.time(),
                    "loss": logs["loss"],
                    "learningRate": logs.get("learning_rate"),
                    "gradNorm": logs.get("grad_norm"),
                    "tokensPerSecond": self._telemetry.progress.tokens_per_second,
                }
            )
        logger.info("step %d of %d", state.global_step, state.max_steps, extra=_loggable(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Pass the validation loss on."""
        self._telemetry.advance(eval_loss=metrics["eval_loss"])
        self._journal.evaluations.append(
            {"step": state.global_step, "time": time.time(), "evalLoss": metrics["eval_loss"]}
        )
        logger.info("validated at step %d", state.global_step, extra={"eval_loss": metrics["eval_loss"]})


class DivergenceCallback(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose adapter is spoilt at the next checkpoint, before that is kept."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the weights."""
        require_numbers(model, state.global_step)


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Puts each checkpoint that transformers saves into storage, and saves one when a stop is asked for."""

    def __init__(self, uploads: CheckpointUploads, journal: Journal, stop: StopSignal) -> None:
        self._uploads, self._journal, self._stop = uploads, journal, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Finish what transformers has just loaded from a checkpoint."""
        if moved := restore_pages(optimizer):
            logger.info("optimizer states are paged again", extra={"bytes": moved})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop after this step, with a checkpoint, if asked to."""
        self._uploads.check()
        if state.global_step >= state.max_steps:
            control.should_save = True  # a stop during what follows, evaluation and upload, mustn't cost the training
        if self._stop.requested and state.global_step < state.max_steps:
            logger.warning("asked to stop: saving a checkpoint at step %d", state.global_step)
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False  # the grace period is short
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Upload what was saved, with what a resumed process needs to know beside it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._journal.save(folder)
        # Else transformers, which keeps one checkpoint, deletes it under the upload when it saves the next.
        leaving = folder.rename(folder.with_name(f"uploading-{state.global_step}"))
        self._uploads.submit(leaving, state.global_step)


def _loggable(logs: dict[str, Any]) -> dict[str, Any]:
    names = ("loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy")
    return {name: logs[name] for name in names if name in logs}
