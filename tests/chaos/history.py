"""What happened to the objects of a namespace, version by version, as watches told it: the witness beside a cell.

It outlives what is broken meanwhile: a watch that ends is taken up where it ended, or after a fresh list.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from qlorajob import names
from tests.support.live import Namespace

Json = dict[str, Any]

PATHS = {
    "QLoRAJob": f"/apis/{names.GROUP}/{names.VERSION}/namespaces/{{}}/{names.PLURAL}",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Pod": "/api/v1/namespaces/{}/pods",
}
PAUSE = 0.3
"""Seconds before the API server is asked again after it didn't answer."""


@dataclass(frozen=True, slots=True)
class Version:
    """An object as it was at a time (seconds since the epoch)."""

    at: float
    kind: str
    raw: Json
    gone: bool = False
    published: bool | None = None
    """For a QLoRAJob that says Succeeded: whether the run's manifest was in S3 when that was seen."""

    @property
    def job(self) -> str:
        """The QLoRAJob that it is, or belongs to."""
        metadata = self.raw["metadata"]
        name: str = metadata["name"] if self.kind == "QLoRAJob" else _labels(self.raw).get(names.LABEL_JOB, "")
        return name

    @property
    def uid(self) -> str:
        uid: str = self.raw["metadata"]["uid"]
        return uid

    @property
    def step(self) -> str:
        return _labels(self.raw).get(names.LABEL_STEP, "")

    @property
    def run(self) -> str:
        return _labels(self.raw).get(names.LABEL_RUN, "")

    @property
    def status(self) -> Json:
        status: Json = self.raw.get("status") or {}
        return status

    @property
    def phase(self) -> str:
        phase: str = self.status.get("phase", "")
        return phase

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.raw["metadata"]

    def true(self, condition: str) -> bool:
        """Whether a condition holds."""
        return any(c["type"] == condition and c["status"] == "True" for c in self.status.get("conditions") or ())


class History:
    """A context in which everything is recorded. `is_published` is asked about each QLoRAJob that says Succeeded."""

    def __init__(self, namespace: Namespace, is_published: Callable[[Json], bool]) -> None:
        self._is_published = is_published
        self._changed = threading.Condition()
        self._versions: list[Version] = []
        self._latest: dict[tuple[str, str], Version] = {}
        self._followers = [_Follower(self, namespace, kind) for kind in PATHS]

    def __enter__(self) -> Self:
        for follower in self._followers:
            follower.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in self._followers:
            follower.stop()

    def record(self, kind: str, raw: Json, *, gone: bool = False) -> None:
        """Another version."""
        published = self._is_published(raw) if kind == "QLoRAJob" and not gone and _says_succeeded(raw) else None
        version = Version(time.time(), kind, raw, gone, published)
        key = (kind, raw["metadata"]["uid"])
        with self._changed:
            before = self._latest.get(key)
            if before and not gone and before.raw["metadata"]["resourceVersion"] == raw["metadata"]["resourceVersion"]:
                return
            self._versions.append(version)
            if gone:
                self._latest.pop(key, None)
            else:
                self._latest[key] = version
            self._changed.notify_all()

    def relisted(self, kind: str, items: list[Json]) -> None:
        """A fresh list: what isn't in it has gone unseen."""
        there = {item["metadata"]["uid"] for item in items}
        with self._changed:
            missing = [version for (k, uid), version in self._latest.items() if k == kind and uid not in there]
        for version in missing:
            self.record(kind, version.raw, gone=True)
        for item in items:
            self.record(kind, item)

    def of(self, job: str) -> list[Version]:
        """Every version of a QLoRAJob and its children, in the order in which they were seen."""
        with self._changed:
            return [version for version in self._versions if version.job == job]

    def now(self, job: str, kind: str, step: str = "") -> list[Version]:
        """The objects there are."""
        with self._changed:
            there = [version for (k, _), version in self._latest.items() if k == kind and version.job == job]
        return [version for version in there if not step or version.step == step]

    def until(self, check: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
        """The first truthy answer of `check`, which is asked after each new version."""
        deadline = time.monotonic() + seconds
        while True:
            with self._changed:
                seen = len(self._versions)
            if answer := check():
                return answer
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"not within {seconds:.0f} s: {what()}")
            with self._changed:
                self._changed.wait_for(lambda: len(self._versions) > seen, left)  # noqa: B023


class _Follower(threading.Thread):
    """Follows one kind of objects with kubectl, whose process ends with the watch, and can be ended."""

    def __init__(self, history: History, namespace: Namespace, kind: str) -> None:
        super().__init__(name=f"watch of {kind}", daemon=True)
        self._history, self._namespace, self._kind = history, namespace, kind
        self._path = PATHS[kind].format(namespace.name)
        self._stopped = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        version = ""
        while not self._stopped.is_set():
            version = self._follow(version) if version else self._list()
            self._stopped.wait(PAUSE)

    def stop(self) -> None:
        self._stopped.set()
        if self._process:
            self._process.terminate()
        self.join(10)

    def _list(self) -> str:
        """The list's version; "" when the server doesn't answer."""
        answer = self._namespace.cluster.try_kubectl("get", "--raw", self._path)
        if answer.returncode:
            return ""
        found = json.loads(answer.stdout)
        self._history.relisted(self._kind, found["items"])
        version: str = found["metadata"]["resourceVersion"]
        return version

    def _follow(self, version: str) -> str:
        """Record until the watch ends; the version to go on from, "" to begin with a list."""
        cluster = self._namespace.cluster
        path = f"{self._path}?watch=true&allowWatchBookmarks=true&resourceVersion={version}"
        command = [str(cluster.layout.bin / "kubectl"), f"--kubeconfig={cluster.kubeconfig}", "get", "--raw", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            self._process = process
            if self._stopped.is_set():
                process.terminate()
            for line in process.stdout or ():
                event = self._event(line)
                if event is None or event["type"] == "ERROR":
                    process.terminate()
                    return ""
                if event["type"] != "BOOKMARK":
                    self._history.record(self._kind, event["object"], gone=event["type"] == "DELETED")
                version = event["object"]["metadata"]["resourceVersion"]
        return version

    @staticmethod
    def _event(line: str) -> Json | None:
        """None for a line that broke off with the connection."""
        try:
            event: Json = json.loads(line)
        except ValueError:
            return None
        return event


def _labels(raw: Json) -> dict[str, str]:
    labels: dict[str, str] = raw["metadata"].get("labels") or {}
    return labels


def _says_succeeded(raw: Json) -> bool:
    return bool((raw.get("status") or {}).get("phase") == "Succeeded")
