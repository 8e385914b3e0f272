"""What the indexes hold although it is gone, which no watch tells after it was too old to go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qlora_operator import absence
from qlora_operator.absence import Absence
from qlora_operator.store import Key, Kind, Present, Store

KEY, OTHER = Key("team", "x"), Key("team", "y")


def raw(uid: str, version: int = 5) -> dict[str, Any]:
    return {"metadata": {"name": uid, "uid": uid, "resourceVersion": str(version)}}


class Cluster:
    """Lists of what is there, at resource version 10; or an API server that is down."""

    def __init__(self, *uids: str, version: int = 10) -> None:
        self.uids, self.version, self.down = set(uids), version, False
        self.asked: list[tuple[Kind, str]] = []
        self.listed: asyncio.Queue[Kind] = asyncio.Queue()
        self.store = Store({KEY: [raw("x")], OTHER: [raw("y")]}, {KEY: [raw("j")]}, {KEY: [raw("p")]}, lambda: 0.0)
        self.changed: list[Key] = []

    async def present(self, kind: Kind, namespace: str) -> Present:
        self.asked.append((kind, namespace))
        self.listed.put_nowait(kind)
        if self.down:
            raise ConnectionError("down")
        return Present(self.version, frozenset(self.uids))

    @property
    def absence(self) -> Absence:
        return Absence(self.store, self.present, self.changed.append)


async def test_what_was_deleted_while_nobody_watched_is_forgotten_and_looked_at() -> None:
    cluster = Cluster("x", "y")
    await cluster.absence.look()
    assert (cluster.store.jobs(KEY), cluster.store.pods(KEY)) == ([], [])
    assert cluster.changed == [KEY, KEY]


async def test_what_is_there_stays() -> None:
    cluster = Cluster("x", "y", "j", "p")
    await cluster.absence.look()
    assert cluster.store.jobs(KEY) == [raw("j")]
    assert cluster.changed == []


async def test_a_qlorajob_that_is_gone_isnt_counted_any_more() -> None:
    cluster = Cluster("y")
    await cluster.absence.look()
    assert list(cluster.store) == [OTHER]
    assert cluster.store.qlorajob(KEY) is None


async def test_a_list_that_is_older_than_the_index_says_nothing() -> None:
    cluster = Cluster(version=4)
    await cluster.absence.look()
    assert cluster.store.jobs(KEY) == [raw("j")]


async def test_a_list_that_fails_is_no_reason_to_forget() -> None:
    cluster = Cluster()
    cluster.down = True
    await cluster.absence.look()
    assert cluster.store.jobs(KEY) == [raw("j")]


async def test_one_list_of_each_kind_is_enough_for_a_namespace() -> None:
    cluster = Cluster("x", "y", "j", "p")
    await cluster.absence.look()
    assert cluster.asked == [("qlorajobs", "team"), ("jobs", "team"), ("pods", "team")]


async def test_a_listing_is_followed_by_another_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "SETTLE_SECONDS", 0)
    cluster = Cluster("x", "y", "j", "p")
    watcher = cluster.absence
    task = asyncio.create_task(watcher.run())
    async with asyncio.timeout(5):
        for _ in range(3):
            await cluster.listed.get()
        cluster.uids.remove("p")
        watcher.listed()
        for _ in range(3):
            await cluster.listed.get()
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert cluster.changed == [KEY]
