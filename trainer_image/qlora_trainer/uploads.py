"""Checkpoints on their way to storage while training goes on: one at a time, in order."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from qlora_trainer.checkpoints import CheckpointStore
from qlora_trainer.signals import StopSignal
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.status import SavedCheckpoint

logger = logging.getLogger(__name__)


class CheckpointUploads:
    """A context in which checkpoints are uploaded in the background; its end waits for the last one.

    An upload that failed, after all patience, is raised at the next `submit` or at the end; where trying again can't
    help, at the next `check`. `saved` is told of each that is in storage, from another thread.
    """

    def __init__(
        self, checkpoints: CheckpointStore, stop: StopSignal, saved: Callable[[SavedCheckpoint], None]
    ) -> None:
        self._checkpoints, self._stop, self._saved = checkpoints, stop, saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def submit(self, folder: Path, step: int) -> None:
        """Upload the checkpoint in `folder`, and delete the folder then. Waits for the one before."""
        try:
            self._wait()
        except StepError as error:
            if not (self._stop.requested and error.code is ExitCode.TRANSIENT):
                raise
            logger.warning("a checkpoint isn't in storage: %s", error.message)  # this one is newer
        self._under_way = self._thread.submit(self._upload, folder, step)

    def check(self) -> None:
        """Raise what makes it pointless to go on."""
        if self._under_way and self._under_way.done():
            error = self._under_way.exception()
            if error is not None and not (isinstance(error, StepError) and error.code is ExitCode.TRANSIENT):
                raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        except Exception as failure:
            if error is None:
                raise self._in_words(failure) from None
            logger.warning("a checkpoint isn't in storage: %s", failure)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _upload(self, folder: Path, step: int) -> None:
        saved = self._checkpoints.save(folder, step)
        shutil.rmtree(folder, ignore_errors=True)
        self._saved(saved)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _in_words(self, failure: Exception) -> Exception:
        """A stop that leaves no checkpoint is still a stop; it says what is lost."""
        if not (self._stop.requested and isinstance(failure, StepError) and failure.code is ExitCode.TRANSIENT):
            return failure
        message = f"stopped, but the newest checkpoint isn't in storage: {failure.message}; resumes from the one before"
        return StepError(Reason.INTERRUPTED, message, field=failure.field, code=ExitCode.INTERRUPTED)
