"""Waiting until storage works again, for as long as that costs less than a new start of the pod."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from qlora_trainer.settings import Settings
from qlora_trainer.signals import StopSignal
from qlora_trainer.storage import Storage, StoredObject, open_storage
from qlorajob.errors import ExitCode, Reason, StepError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a failing request is repeated. A new pod loads the model again, which takes minutes, too."""
ANSWERED_PATIENCE = 60.0
"""The same, before there is a run to lose, of a server that answers, but not now. Where nobody answers, the user learns
it at once."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
LOOK = 0.5
"""Seconds between two looks at whether a stop was asked for."""

_jitter = random.Random()  # noqa: S311 - not the generator that training draws from


def open_input(uri: str, settings: Settings, *, field: str) -> Storage:
    """The S3 that a model or data are read from. A stop interrupts the waiting: reading them is never deferred."""
    accepted = settings.config.prepared is not None
    return while_it_answers(open_storage(uri, settings.spec.output, field=field, accepted=accepted), StopSignal())


def while_it_answers(storage: Storage, stop: StopSignal) -> PatientStorage:
    """Waits for a server that answers, but not now."""
    return PatientStorage(storage, stop, seconds=ANSWERED_PATIENCE, reasons={Reason.STORAGE_UNAVAILABLE})


class PatientStorage:
    """A Storage that repeats what failed for a transient reason, with growing and random pauses.

    When a stop is asked for, patience ends with the grace period. `reasons` are those that are worth waiting for.
    """

    def __init__(
        self,
        storage: Storage,
        stop: StopSignal,
        *,
        seconds: float | None = None,
        reasons: Container[Reason] = frozenset(Reason),
    ) -> None:
        self.uri = storage.uri
        self._storage, self._stop, self._reasons = storage, stop, reasons
        self._seconds = PATIENCE if seconds is None else seconds

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Storage."""
        return iter(self._repeat(lambda: [*self._storage.list(prefix)]))

    def read(self, key: str) -> bytes | None:
        """See Storage."""
        return self._repeat(lambda: self._storage.read(key))

    def read_start(self, key: str, length: int) -> bytes:
        """See Storage."""
        return self._repeat(lambda: self._storage.read_start(key, length))

    def write(self, key: str, content: bytes, *, over: str | None = None) -> str:
        """See Storage."""
        return self._repeat(lambda: self._storage.write(key, content, over=over))

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        self._repeat(lambda: self._storage.download(key, path))

    def upload(self, path: Path, key: str, *, over: str | None = None) -> str:
        """See Storage."""
        return self._repeat(lambda: self._storage.upload(path, key, over=over))

    def delete(self, keys: Iterable[str]) -> None:
        """See Storage."""
        pending = [*keys]
        self._repeat(lambda: self._storage.delete(pending))

    def abort_uploads(self) -> int:
        """See Storage."""
        return self._repeat(self._storage.abort_uploads)

    def within(self, prefix: str) -> PatientStorage:
        """See Storage."""
        storage = self._storage.within(prefix)
        return PatientStorage(storage, self._stop, seconds=self._seconds, reasons=self._reasons)

    def _repeat(self, action: Callable[[], T]) -> T:
        end: float | None = None
        longest = FIRST_PAUSE
        while True:
            try:
                return action()
            except StepError as error:
                if error.code is not ExitCode.TRANSIENT or error.reason not in self._reasons:
                    raise
                end = end or time.monotonic() + self._seconds
                pause = longest * _jitter.uniform(0.5, 1)
                if pause > self._seconds_left(end):
                    raise
                logger.warning("%s; trying again in %.1f s", error.message, pause, extra={"reason": error.reason})
            if not self._sleep(pause, end):
                return action()  # a last try
            longest = min(2 * longest, LONGEST_PAUSE)

    def _seconds_left(self, end: float) -> float:
        left = end - time.monotonic()
        grace = self._stop.seconds_left
        return left if grace is None else min(left, grace)

    def _sleep(self, seconds: float, end: float) -> bool:
        """Whether the whole time passed; not when a stop that was asked for meanwhile leaves less."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if left > self._seconds_left(end):
                return False
            time.sleep(min(LOOK, left))
        return True
