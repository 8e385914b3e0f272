"""The API server hears of changes, and of nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from aiohttp import web

from qlora_operator.api import Api
from qlora_operator.config import OperatorConfig
from qlora_operator.controller import Controller
from qlora_operator.experience import Experience
from qlora_operator.fleet import Fleet
from qlora_operator.metrics import Metrics
from qlora_operator.patching import merge_patch
from qlora_operator.progress import Poller
from qlora_operator.store import Key, Store
from qlorajob.status import Progress
from tests.unit.operator.world import SPEC

KEY = Key("team", "x")
Json = dict[str, Any]


@dataclass
class Server:
    """One QLoRAJob, its Jobs and pods, as an API server keeps them; counts writes."""

    job: Json = field(default_factory=lambda: _qlorajob())
    jobs: dict[Key, list[Json]] = field(default_factory=lambda: {KEY: []})
    pods: dict[Key, list[Json]] = field(default_factory=lambda: {KEY: []})
    writes: list[str] = field(default_factory=list)
    progress: Progress | None = None
    said: list[Json] = field(default_factory=list)

    @property
    def controller(self) -> Controller:
        store = Store({KEY: [self.job]}, self.jobs, self.pods, lambda: 0.0)
        experience = Experience(cast("Api", self), None, "trainer:1", lambda: 0.0)
        api, metrics = cast("Api", self), Metrics(list)
        return Controller(api, store, Fleet, experience, OperatorConfig(), metrics, lambda _: self.progress)

    async def create_job(self, manifest: Json) -> Json:
        self.writes.append("job")
        made = {**manifest, "metadata": {**manifest["metadata"], "uid": "j1"}}
        self.jobs[KEY].append(made)
        return made

    async def patch_status(self, _: Any, patch: Json) -> Json:
        self.writes.append("status")
        version = str(int(self.job["metadata"]["resourceVersion"]) + 1)
        self.job = {
            **self.job,
            "metadata": {**self.job["metadata"], "resourceVersion": version},
            "status": _patched(self.job.get("status") or {}, patch),
        }
        return self.job

    async def create_event(self, *_: Any) -> None:
        self.writes.append("event")

    async def warnings(self, *_: Any) -> list[Json]:
        return self.said


def _qlorajob() -> Json:
    metadata = {"name": "x", "namespace": "team", "uid": "u1", "generation": 1, "resourceVersion": "1"}
    return {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": metadata, "spec": SPEC}


def _patched(old: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    found = {**(old if isinstance(old, dict) else {})}
    for name, value in patch.items():
        found[name] = _patched(found.get(name), value)
    return {name: value for name, value in found.items() if value is not None}


async def settle(server: Server) -> None:
    for _ in range(4):
        await server.controller.look(KEY)


async def test_a_look_at_what_has_not_changed_writes_nothing() -> None:
    server = Server()
    await settle(server)
    assert server.writes.count("job") == 1
    server.writes.clear()
    for _ in range(10):
        await server.controller.look(KEY)
    assert server.writes == []


async def test_a_change_is_one_patch_of_what_changed() -> None:
    server = Server()
    await settle(server)
    before = server.job["status"]
    server.writes.clear()
    metadata = {"name": "p", "uid": "p1", "ownerReferences": [{"controller": True, "uid": "j1", "name": "j"}]}
    server.pods[KEY] = [{"metadata": metadata, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}}]
    await settle(server)
    assert server.writes == ["status"]
    assert set(merge_patch(before, server.job["status"])) <= {"conditions", "phase"}


async def test_a_quota_that_refuses_the_next_pod_is_told_although_there_was_one() -> None:
    server = Server()
    await settle(server)
    old, late = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
    (job,) = server.jobs[KEY]
    job["metadata"]["creationTimestamp"] = old
    metadata = {
        "name": "p",
        "uid": "p1",
        "creationTimestamp": old,
        "ownerReferences": [{"controller": True, "uid": "j1", "name": "j"}],
    }
    server.pods[KEY] = [{"metadata": metadata, "spec": {"nodeName": "n"}, "status": {"phase": "Failed"}}]
    server.said = [
        {"reason": "FailedCreate", "message": "exceeded quota", "firstTimestamp": late, "lastTimestamp": late}
    ]
    await settle(server)
    ready = next(each for each in server.job["status"]["conditions"] if each["type"] == "Ready")
    assert (ready["reason"], "exceeded quota" in ready["message"]) == ("PodCreationFailed", True)


# Progress


class Trainer:
    """A pod's /progress, whose answer changes with each question as `answer` says."""

    def __init__(self, answer: Callable[[int], Progress]) -> None:
        self._answer = answer
        self.asked = 0
        self.often = asyncio.Event()

    async def serve(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.asked == 6:
            self.often.set()
        return web.json_response(json.loads(self._answer(self.asked).model_dump_json(by_alias=True)))


async def changes(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Looks that the poller asks for while it hears from the trainer six times."""
    app = web.Application()
    app.router.add_get("/progress", trainer.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    monkeypatch.setattr("qlora_operator.progress.METRICS_PORT", runner.addresses[0][1])
    metadata = {"name": "p", "uid": "p1", "labels": {"qlora.dev/step": "train"}}
    pod = {"metadata": metadata, "spec": {}, "status": {"phase": "Running", "podIP": "127.0.0.1"}}
    seen: list[Key] = []
    poller = Poller(Store({KEY: [_qlorajob()]}, {}, {KEY: [pod]}, lambda: 0.0), Metrics(list), seen.append, 0.01)
    task = asyncio.create_task(poller.run())
    await trainer.often.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await runner.cleanup()
    return seen


async def test_a_trainer_that_makes_no_step_causes_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Trainer(lambda asked: Progress(step=7, total_steps=60, eta_seconds=100 + asked))
    assert await changes(stuck, monkeypatch) == [KEY]


async def test_a_trainer_of_fast_steps_causes_one_write_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Trainer(lambda asked: Progress(step=1000 * asked, total_steps=60_000))
    assert len(await changes(fast, monkeypatch)) in (fast.asked - 1, fast.asked)
