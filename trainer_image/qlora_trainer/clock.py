"""How long each part of a command took: in its log and in report.json."""

from __future__ import annotations

import logging
import time


class Clock:
    """A stopwatch with named laps."""

    def __init__(self, logger: logging.Logger) -> None:
        self.laps: dict[str, float] = {}
        self._logger = logger
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """Note the time since the last lap as that of `part`."""
        now = time.monotonic()
        self.laps[part] = round(now - self._last, 2)
        self._last = now
        self._logger.info("%s done", part, extra={"seconds": self.laps[part]})
