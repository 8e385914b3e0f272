"""Which of several operators acts: the one that holds a Lease (coordination.k8s.io). As client-go's leader election.

A candidate takes over a Lease that nobody holds, or that it has seen unchanged for its whole duration by its own
clock: clocks of different machines are never compared. A leader that couldn't renew for two thirds of the duration
stops leading, before anybody else may begin. (kubernetes.aio has a leader election too; it can't release a Lease, ends
on errors of the connection, and goes by the wall clock.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Protocol

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 2.0
"""Between two looks of a candidate: a Lease that is released is taken within this time."""
RENEWALS: Final = 5
"""Of a leader, in the time of a Lease's duration."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a Lease says. `version` is its resourceVersion; "" for one that isn't there yet."""

    holder: str = ""
    """Identity of the leader; "" when nobody leads."""
    seconds: int = 15
    """Its leaseDurationSeconds."""
    transitions: int = 0
    """How often the holder changed."""
    acquired_at: datetime | None = None
    renewed_at: datetime | None = None
    """For people: nobody decides by it."""
    version: str = ""


class Leases(Protocol):
    """Reads and writes of the one Lease. Both raise where they can't, and `write` where the version isn't the last."""

    async def read(self) -> Lease | None:
        """None where there is none."""

    async def write(self, lease: Lease) -> Lease:
        """Create it, or change it if it still has that version. What is there then."""


class Leadership:
    """What one candidate knows. `clock` is monotonic."""

    def __init__(self, leases: Leases, identity: str, seconds: int, clock: Callable[[], float]) -> None:
        self._leases, self._identity, self._seconds, self._clock = leases, identity, seconds, clock
        self._seen: Lease | None = None
        self._seen_at = 0.0
        self._until = -float("inf")

    @property
    def holds(self) -> bool:
        """It may act now."""
        return self._clock() < self._until

    async def claim(self) -> None:
        """Take or renew the Lease, if it may be had. Raises what the API server's client raises."""
        asked_at = self._clock()
        # Somebody has deleted it, perhaps: whoever held it may not know yet.
        gone = Lease(holder=self._seen.holder if self._seen else "", seconds=self._seconds)
        lease = await self._leases.read() or gone
        if self._seen is None or lease.version != self._seen.version:
            self._seen, self._seen_at = lease, self._clock()
        if lease.holder not in ("", self._identity) and self._clock() < self._seen_at + lease.seconds:
            self._until = -float("inf")
            return
        now, mine = datetime.now(UTC), lease.holder == self._identity
        self._seen = await self._leases.write(
            replace(
                lease,
                holder=self._identity,
                seconds=self._seconds,
                transitions=lease.transitions + (not mine and bool(lease.version)),
                acquired_at=lease.acquired_at if mine else now,
                renewed_at=now,
            )
        )
        self._until = asked_at + self._seconds * 2 / 3

    async def release(self) -> None:
        """Let another one lead at once. To be called when nothing is under way any more."""
        self._until = -float("inf")
        lease = await self._leases.read()
        if lease and lease.holder == self._identity:
            await self._leases.write(replace(lease, holder="", seconds=1, renewed_at=datetime.now(UTC)))


async def lead(leadership: Leadership, seconds: int, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` whenever, and only while, this process holds the Lease. Ends only with an error of `work`'s."""
    while True:
        await _claim(leadership)
        if leadership.holds:
            logger.info("leading")
            await _while_leading(leadership, seconds / RENEWALS, work)
            logger.warning("not leading any more: waiting for the Lease")
        await asyncio.sleep(RETRY_SECONDS)


async def _while_leading(leadership: Leadership, pause: float, work: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(work())
    try:
        while leadership.holds:
            await asyncio.wait([task], timeout=pause)
            if task.done():
                await task
                raise RuntimeError("the work has ended")
            await _claim(leadership)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _claim(leadership: Leadership) -> None:
    """An API server that doesn't answer, or another candidate that was faster: the next try may succeed."""
    try:
        await leadership.claim()
    except Exception as error:
        logger.warning("can't take or renew the Lease: %s", error)
