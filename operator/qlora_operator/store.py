"""What the operator knows of the cluster: kopf's indexes, corrected by its own latest writes.

An index lags behind a write by a few milliseconds. A look in between would decide on yesterday's facts, so what the API
server answered to a write counts until the index has caught up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Raw = Mapping[str, Any]
Kind = Literal["qlorajobs", "jobs", "pods"]
FORGET_AFTER = 60.0
"""Seconds after which a write that the index never showed is forgotten: the object came and went in between."""


class Key(NamedTuple):
    """Namespace and name of a QLoRAJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


Index = Mapping[Key, Iterable[Raw]]


@dataclass(frozen=True, slots=True)
class Present:
    """A list of one kind of objects in one namespace."""

    version: int
    """The resource version at which it held."""
    uids: frozenset[str]

    def lacks(self, raw: Raw) -> bool:
        """The object was there, and isn't any more. A list may be older than what an index has heard."""
        metadata = raw["metadata"]
        return metadata["uid"] not in self.uids and int(metadata["resourceVersion"]) <= self.version


@dataclass(slots=True)
class _Writes:
    """What was written about one QLoRAJob and not yet seen in the index."""

    job: Raw | None = None
    created: dict[str, tuple[Raw, float]] = field(default_factory=dict)
    deleted: dict[str, float] = field(default_factory=dict)


class Store:
    """Reads by key. `clock` is monotonic."""

    def __init__(self, qlorajobs: Index, jobs: Index, pods: Index, clock: Callable[[], float]) -> None:
        self._qlorajobs, self._jobs, self._pods = qlorajobs, jobs, pods
        self._clock = clock
        self._writes: dict[Key, _Writes] = {}
        self._gone: set[str] = set()

    def __iter__(self) -> Iterator[Key]:
        """Every QLoRAJob there is."""
        yield from [key for key in self._qlorajobs if self._at(self._qlorajobs, key)]

    def with_jobs_labelled(self, label: str, value: str) -> list[Key]:
        """Those that may have a Job with this label: a quick look through all Jobs there are."""
        indexed = {key for key in self._jobs for job in self._jobs[key] if label_of(job, label) == value}
        written = {
            key
            for key, writes in self._writes.items()
            for job, _ in writes.created.values()
            if label_of(job, label) == value
        }
        return sorted(indexed | written)

    def held(self) -> Iterator[tuple[Kind, Key, Raw]]:
        """Every object in the indexes, with its kind and the QLoRAJob it belongs to."""
        indexes: dict[Kind, Index] = {"qlorajobs": self._qlorajobs, "jobs": self._jobs, "pods": self._pods}
        for kind, index in indexes.items():
            for key in list(index):
                for raw in self._at(index, key):
                    yield kind, key, raw

    def forget(self, uid: str) -> None:
        """The object with this uid is gone, whatever the indexes say."""
        self._gone.add(uid)

    def qlorajob(self, key: Key) -> Raw | None:
        """The newest known version of the object; None when it is gone."""
        indexed = next(iter(self._at(self._qlorajobs, key)), None)
        writes = self._writes.get(key)
        if indexed is None:
            self._writes.pop(key, None)
            return None
        if writes is None or writes.job is None:
            return indexed
        if _is_newer(writes.job, indexed):
            return writes.job
        writes.job = None
        return indexed

    def jobs(self, key: Key) -> list[Raw]:
        """Its Jobs, those just created included, those just deleted marked so."""
        indexed = {job["metadata"]["name"]: job for job in self._at(self._jobs, key)}
        writes = self._writes.get(key)
        if writes is None:
            return list(indexed.values())
        now = self._clock()
        uids = {job["metadata"]["uid"] for job in indexed.values()}
        writes.created = {n: (j, t) for n, (j, t) in writes.created.items() if n not in indexed and now < t}
        writes.deleted = {uid: until for uid, until in writes.deleted.items() if uid in uids and now < until}
        created = [job for job, _ in writes.created.values()]
        return [
            _deleting(job) if job["metadata"]["uid"] in writes.deleted else job for job in indexed.values()
        ] + created

    def pods(self, key: Key) -> list[Raw]:
        """Its Jobs' pods."""
        return list(self._at(self._pods, key))

    def wrote_qlorajob(self, key: Key, raw: Raw) -> None:
        """The API server's answer to a change of the object."""
        self._of(key).job = raw

    def created_job(self, key: Key, raw: Raw) -> None:
        """The API server's answer to a creation."""
        self._of(key).created[raw["metadata"]["name"]] = (raw, self._clock() + FORGET_AFTER)

    def deleted_job(self, key: Key, uid: str) -> None:
        """The API server has accepted a deletion."""
        self._of(key).deleted[uid] = self._clock() + FORGET_AFTER

    def _of(self, key: Key) -> _Writes:
        return self._writes.setdefault(key, _Writes())

    def _at(self, index: Index, key: Key) -> list[Raw]:
        found = index[key] if key in index else ()  # noqa: SIM401 (kopf's indexes have no get)
        return [raw for raw in found if raw["metadata"].get("uid") not in self._gone]


def _is_newer(one: Raw, other: Raw) -> bool:
    """Resource versions of one object are numbers that grow (guaranteed since Kubernetes 1.35, true long before)."""
    one_meta, other_meta = one["metadata"], other["metadata"]
    if one_meta["uid"] != other_meta["uid"]:
        return False
    return int(one_meta["resourceVersion"]) > int(other_meta["resourceVersion"])


def label_of(raw: Raw, label: str) -> str | None:
    """The value of an object's label."""
    return (raw["metadata"].get("labels") or {}).get(label)


def _deleting(job: Raw) -> Raw:
    return {**job, "metadata": {**job["metadata"], "deletionTimestamp": "1970-01-01T00:00:00Z"}}
