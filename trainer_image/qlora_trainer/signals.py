"""SIGTERM: a pod is asked to stop, because of a preemption, a drain or a suspended job."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MARGIN = 5.0
"""Seconds of the grace period that are kept for writing the report and for the interpreter's end."""


class Stopped(BaseException):
    """Raised where the program stands when a stop is asked for and nothing has to be finished first.

    Not an Exception, so that no `except Exception` of a library swallows it.
    """


class StopSignal:
    """Remembers that a stop was asked for. Within `deferred()` it only remembers, else it raises Stopped, once."""

    def __init__(self) -> None:
        self.requested = False
        self.grace_seconds = 30.0
        """Seconds from the signal to the end by force: Kubernetes' default, until the run config says more."""
        self._requested_at = 0.0
        self._deferred = False

    def install(self) -> None:
        """Handle SIGTERM (kubelet) and SIGINT (Ctrl-C in `qlora run`). Only from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @property
    def seconds_left(self) -> float | None:
        """Time to the end of the grace period, less a margin; None while no stop was asked for."""
        if not self.requested:
            return None
        return self._requested_at + self.grace_seconds - MARGIN - time.monotonic()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block look at `requested` and stop where it is safe, for example after an optimizer step."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        if first:
            self._requested_at = time.monotonic()
        self.requested = True
        if first and not self._deferred:
            raise Stopped
