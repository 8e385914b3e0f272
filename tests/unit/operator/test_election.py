"""Several candidates for one Lease: never two that act, and somebody does as soon as it may."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qlora_operator.election import Leadership, Lease, lead
from qlora_operator.workqueue import WorkQueue

SECONDS = 15


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Server:
    """An API server with one Lease and optimistic locking."""

    lease: Lease | None = None
    writes: int = 0
    down: bool = False

    def read(self) -> Lease | None:
        if self.down:
            raise ConnectionError("down")
        return self.lease

    def write(self, lease: Lease) -> Lease:
        if self.down or lease.version != (self.lease.version if self.lease else ""):
            raise ConnectionError("down, or a conflict")
        self.writes += 1
        self.lease = replace(lease, version=str(self.writes))
        return self.lease


@dataclass
class Connection:
    """One candidate's way to the server; `hold` lets it stop between its read and its write."""

    server: Server
    hold: bool = False

    async def read(self) -> Lease | None:
        found = self.server.read()
        if self.hold:
            await asyncio.sleep(0)
        return found

    async def write(self, lease: Lease) -> Lease:
        return self.server.write(lease)


@dataclass
class Candidate:
    """A process with a clock of its own, which runs as fast as the others' but shows another time."""

    server: Server
    name: str
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.connection = Connection(self.server)
        self.leadership = Leadership(self.connection, self.name, SECONDS, self.clock)

    def claim(self) -> bool:
        with _errors_are_survived():
            step(self.leadership.claim())
        return self.leadership.holds


class _errors_are_survived:  # noqa: N801 (reads as a statement)
    def __enter__(self) -> None: ...
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        return isinstance(error, ConnectionError)


def step(work: Coroutine[Any, Any, None]) -> bool:
    """Run a coroutine to where it waits. Whether it has ended."""
    try:
        work.send(None)
    except StopIteration:
        return True
    return False


def two() -> tuple[Server, Candidate, Candidate]:
    server = Server()
    return server, Candidate(server, "a"), Candidate(server, "b", Clock(77.0))


def later(seconds: float, *candidates: Candidate) -> None:
    for candidate in candidates:
        candidate.clock.now += seconds


def test_the_first_leads_and_the_second_stands_by() -> None:
    server, one, other = two()
    assert one.claim()
    assert not other.claim()
    assert server.lease
    assert (server.lease.holder, server.lease.seconds, server.lease.transitions) == ("a", SECONDS, 0)


def test_a_leader_that_renews_stays() -> None:
    _, one, other = two()
    for _ in range(20):
        assert one.claim()
        assert not other.claim()
        later(3, one, other)


def test_a_killed_leader_is_replaced_within_the_leases_duration() -> None:
    server, one, other = two()
    one.claim()
    other.claim()
    later(SECONDS - 1, one, other)
    assert not other.claim()
    later(1, one, other)
    assert other.claim()
    assert server.lease
    assert server.lease.transitions == 1


def test_a_leader_that_is_stopped_lets_the_other_lead_at_once() -> None:
    _, one, other = two()
    one.claim()
    other.claim()
    step(one.leadership.release())
    assert not one.leadership.holds
    assert other.claim()


def test_a_standby_releases_nothing() -> None:
    server, one, other = two()
    one.claim()
    other.claim()
    step(other.leadership.release())
    assert server.lease
    assert server.lease.holder == "a"


def test_a_leader_that_is_cut_off_stops_before_another_begins() -> None:
    server, one, other = two()
    one.claim()
    other.claim()
    server.down = True
    later(SECONDS * 2 / 3, one, other)
    assert not one.claim()
    server.down = False
    assert not other.claim()
    assert one.claim()  # it is back before anybody took over


def test_a_container_that_is_started_again_leads_at_once() -> None:
    server, one, _ = two()
    one.claim()
    assert Candidate(server, "a").claim()


def test_a_lease_that_somebody_deletes_is_left_to_its_holder_until_that_must_know() -> None:
    server, one, other = two()
    one.claim()
    other.claim()
    server.lease = None
    assert not other.claim()
    later(SECONDS - 1, one, other)
    assert not one.leadership.holds
    assert not other.claim()
    later(1, one, other)
    assert other.claim()


class Elections(RuleBasedStateMachine):
    """Claims that take their time, errors, kills, releases, clocks that run: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.candidates = [
            Candidate(self.server, name, Clock(start)) for name, start in (("a", 0), ("b", 500), ("c", 9))
        ]
        self.under_way: dict[int, Coroutine[Any, Any, None]] = {}

    @rule(who=st.integers(0, 2))
    def claim(self, who: int) -> None:
        """Begin a claim: it has read, and not yet written."""
        if who not in self.under_way:
            self.candidates[who].connection.hold = True
            work = self.candidates[who].leadership.claim()
            with _errors_are_survived():
                if not step(work):
                    self.under_way[who] = work

    @rule(who=st.integers(0, 2))
    def end(self, who: int) -> None:
        if who in self.under_way:
            with _errors_are_survived():
                step(self.under_way.pop(who))

    @rule(who=st.integers(0, 2))
    def release(self, who: int) -> None:
        if who in self.under_way:
            self.under_way.pop(who).close()
        self.candidates[who].connection.hold = False
        with _errors_are_survived():
            step(self.candidates[who].leadership.release())

    @rule(seconds=st.sampled_from([0.1, 1, 3, 5, 9.9, 10, 15]))
    def wait(self, seconds: float) -> None:
        later(seconds, *self.candidates)

    @rule(down=st.booleans())
    def network(self, down: bool) -> None:
        self.server.down = down

    @invariant()
    def at_most_one_leads(self) -> None:
        assert sum(candidate.leadership.holds for candidate in self.candidates) <= 1

    def teardown(self) -> None:
        """With a network, somebody leads before two durations are over."""
        for work in self.under_way.values():
            work.close()
        self.server.down = False
        for _ in range(2 * SECONDS + 1):
            for candidate in self.candidates:
                candidate.connection.hold = False
                candidate.claim()
            later(1, *self.candidates)
        assert sum(candidate.leadership.holds for candidate in self.candidates) == 1


TestElections = Elections.TestCase
TestElections.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# The loop


async def test_the_work_ends_with_the_leadership_and_begins_again_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_operator.election.RETRY_SECONDS", 0.001)
    server, clock = Server(), Clock()
    candidate = Candidate(server, "a", clock)
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    loop = asyncio.create_task(lead(candidate.leadership, 0, work))
    for _ in range(2):
        await began.wait()
        assert candidate.leadership.holds
        began.clear()
        server.down = True
        clock.now += SECONDS
        await ended.wait()
        ended.clear()
        server.down = False
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_work_that_fails_ends_the_loop_so_that_the_probe_sees_it() -> None:
    async def work() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await lead(Candidate(Server(), "a").leadership, 1, work)


async def test_a_queue_that_is_run_again_begins_with_what_it_left() -> None:
    seen: list[str] = []
    busy, done = asyncio.Event(), asyncio.Event()

    async def look(key: str) -> float | None:
        seen.append(key)
        if len(seen) == 5:
            done.set()
        if key == "slow" and seen.count(key) == 1:
            busy.set()
            await asyncio.Event().wait()
        return 60.0 if key == "due" and seen.count(key) == 1 else None

    queue: WorkQueue[str] = WorkQueue(look, workers=2)
    for key in ("due", "slow"):
        queue.add(key)
    first = asyncio.create_task(queue.run())
    await busy.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    queue.add("new")
    second = asyncio.create_task(queue.run())
    await done.wait()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert sorted(seen) == ["due", "due", "new", "slow", "slow"]
