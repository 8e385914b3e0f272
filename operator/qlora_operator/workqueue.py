"""A keyed work queue, as client-go's: many events about one object become one look at it.

kopf has none: its handlers run per event of one resource, and a Job's or pod's event must lead to a look at the
QLoRAJob, which is another resource. No kept library on PyPI has de-duplication, one worker per key and back-off
together (aiojobs and arq schedule jobs, not keys), and it is small.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
logger = logging.getLogger(__name__)


class WorkQueue(Generic[K]):
    """Calls `work(key)` for each added key, one at a time per key, several keys at once.

    `work` returns the seconds after which to look again, or None. When it raises, the key comes back after a back-off.
    """

    def __init__(
        self,
        work: Callable[[K], Awaitable[float | None]],
        *,
        workers: int = 8,
        backoff_seconds: float = 1.0,
        backoff_max_seconds: float = 60.0,
    ) -> None:
        self._work = work
        self._workers = workers
        self._backoff = backoff_seconds
        self._backoff_max = backoff_max_seconds
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()  # in _ready
        self._running: set[K] = set()
        self._again: set[K] = set()  # added while running
        self._failures: dict[K, int] = {}
        self._timers: dict[K, asyncio.TimerHandle] = {}

    def add(self, key: K) -> None:
        """Look at `key` soon. Adding it again before that changes nothing."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Look at `key` after that time; the earliest of several wins."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._fire, key)

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def run(self) -> None:
        """Work until cancelled. Run again, it begins with what was under way or due then."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._workers):
                    group.create_task(self._worker(), name=f"worker {number}")
        finally:
            timers, self._timers = self._timers, {}
            for key, timer in timers.items():
                timer.cancel()
                self.add(key)

    async def _worker(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._running.add(key)
            try:
                await self._process(key)
            except asyncio.CancelledError:
                self._again.add(key)
                raise
            finally:
                self._running.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    async def _process(self, key: K) -> None:
        try:
            again = await self._work(key)
        except Exception as error:  # whatever it is, the other keys go on, and this one gets another chance
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(self._backoff * 2 ** min(failures - 1, 30), self._backoff_max)
            logger.warning("%s; trying again in %.0f s", error, delay, extra={"key": str(key)}, exc_info=failures > 2)
            self.add_after(key, delay)
        else:
            self._failures.pop(key, None)
            if again is not None:
                self.add_after(key, again)
