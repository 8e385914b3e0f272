"""One manifest applied twice: one QLoRAJob trains, the other one waits for it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from qlora_operator.api import Api
from qlora_operator.config import OperatorConfig
from qlora_operator.controller import Controller
from qlora_operator.decision import CreateJob, Decision
from qlora_operator.experience import Experience
from qlora_operator.fleet import Fleet
from qlora_operator.metrics import Metrics
from qlora_operator.rivals import Rivals, started_run
from qlora_operator.store import Key, Store
from qlorajob.identity import prepare_key
from qlorajob.names import LABEL_RUN
from qlorajob.resource import parse
from qlorajob.status import Phase, QLoRAJobStatus
from tests.support.reports import prepared
from tests.unit.operator.world import SPEC, World

MINE, OTHER = Key("prod", "x"), Key("dev", "x")


def qlorajob(uri: str = "s3://adapters/x", **output: str) -> dict[str, Any]:
    return {"metadata": {"name": "x", "uid": uri}, "spec": {"output": {"uri": uri, **output}}}


def job(run: str | None = "run1", *conditions: str) -> dict[str, Any]:
    labels = {LABEL_RUN: run} if run else {}
    status = {"conditions": [{"type": kind, "status": "True"} for kind in conditions]}
    return {"metadata": {"name": "j", "uid": "j", "labels": labels}, "spec": {}, "status": status}


def rivals(other: dict[str, Any], *jobs: dict[str, Any]) -> tuple[str, ...]:
    return Rivals(Store({MINE: [qlorajob()], OTHER: [other]}, {OTHER: jobs}, {}, lambda: 0.0)).of(MINE, "run1")


def test_who_works_on_a_run_into_the_same_output_is_a_rival() -> None:
    assert rivals(qlorajob("s3://adapters/x/"), job()) == ("dev/x",)


def test_who_writes_elsewhere_or_has_ended_or_only_prepares_is_none() -> None:
    assert rivals(qlorajob("s3://adapters/y"), job()) == ()
    assert rivals(qlorajob(endpoint="https://minio"), job()) == ()
    assert rivals(qlorajob(), job("run1", "Complete"), job("run1", "Failed"), job(None), job("run2")) == ()


def test_its_own_jobs_make_nobody_a_rival_of_itself() -> None:
    assert Rivals(Store({MINE: [qlorajob()]}, {MINE: [job()]}, {}, lambda: 0.0)).of(MINE, "run1") == ()


def test_of_two_that_start_at_once_the_second_sees_the_first() -> None:
    both = Rivals(Store({MINE: [qlorajob()], OTHER: [qlorajob()]}, {}, {}, lambda: 0.0))
    run = started_run(Decision(QLoRAJobStatus(), actions=(CreateJob(job()),)))
    assert run == "run1"
    both.start(OTHER, run)
    assert both.of(MINE, "run1") == ("dev/x",)
    both.started(OTHER)
    assert both.of(MINE, "run1") == ()


def test_a_run_that_another_one_trains_is_waited_for_and_started_after_it() -> None:
    world = World()
    world.rivals = ("dev/x",)
    world.prepare()
    assert world.live("train") == []
    assert world.status.phase is Phase.PENDING
    assert "Waiting for QLoRAJob dev/x" in world.message()
    world.rivals = ()
    world.look()
    assert len(world.live("train")) == 1


def test_a_merge_waits_too() -> None:
    world = World()
    world.prepare()
    world.edit({"merge": {"enabled": True}})
    world.rivals = ("dev/x",)  # which it found itself trained before
    world.train()
    assert (world.status.phase, world.live("merge")) == (Phase.PENDING, [])


async def test_the_same_manifest_in_two_namespaces_makes_one_training_job() -> None:
    """The whole way through the controller, with both looks under way at the same time."""
    cluster = Twins()
    await asyncio.gather(*(cluster.controller.look(key) for key in (MINE, OTHER)))
    assert len(cluster.created) == 1
    await cluster.controller.look(MINE)
    await cluster.controller.look(OTHER)
    assert len(cluster.created) == 1


class Twins:
    """Two QLoRAJobs that are prepared for one run, and an API server that takes its time."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        jobs = {key: [self._prepared(key)] for key in (MINE, OTHER)}
        self.store = Store(jobs, {}, {}, lambda: 0.0)
        api, metrics = cast("Api", self), Metrics(list)
        experience = Experience(api, None, "trainer:1", lambda: 0.0)
        self.controller = Controller(api, self.store, Fleet, experience, OperatorConfig(), metrics, lambda _: None)

    def _prepared(self, key: Key) -> dict[str, Any]:
        metadata = {"name": key.name, "namespace": key.namespace, "uid": str(key), "resourceVersion": "1"}
        found = {"metadata": metadata, "spec": SPEC, "apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob"}
        spec_key = prepare_key(parse(found).spec)
        status = {"run": {"id": "run1"}, "prepared": prepared(spec_key).to_wire()}
        return found | {"status": status}

    async def create_job(self, manifest: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        self.created.append(manifest)
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "j", "resourceVersion": "2"}}

    async def patch_status(self, metadata: Any, patch: dict[str, Any]) -> dict[str, Any]:
        key = Key(metadata.namespace, metadata.name)
        raw = self.store.qlorajob(key) or {}
        version = {"resourceVersion": str(int(raw["metadata"]["resourceVersion"]) + 1)}
        return {**raw, "metadata": raw["metadata"] | version, "status": raw["status"] | patch}

    async def create_event(self, *_: Any) -> None:
        pass

    async def warnings(self, *_: Any) -> list[dict[str, Any]]:
        return []
