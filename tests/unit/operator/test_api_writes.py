"""What goes over the wire to the API server: the Lease, and nothing from an operator that doesn't lead."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from qlora_operator.api import MERGE_PATCH, Api, TemporaryApiError
from qlora_operator.config import OperatorConfig
from qlora_operator.decision import Event
from qlora_operator.election import Lease
from qlora_operator.handlers import ENV_LEASE, ENV_METRICS_PORT, ENV_NAMESPACE, ENV_POD, Runtime
from qlora_operator.inventory import Inventory
from qlora_operator.store import Store
from qlorajob.resource import Metadata

WHOLE_SECOND = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
METADATA = Metadata(name="x", namespace="team", uid="u")


class Server:
    """The Lease endpoints of an API server, with optimistic locking; counts every request."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.requests: list[tuple[str, str]] = []
        self.version = 0
        self.seen = asyncio.Condition()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what requests lead to."""
        async with self.seen, asyncio.timeout(20):
            await self.seen.wait_for(holds)

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path))
        answer = await self._handle(request)
        async with self.seen:
            self.seen.notify_all()
        return answer

    async def _handle(self, request: web.Request) -> web.Response:
        body = json.loads(await request.text() or "{}")
        if request.method == "GET":
            return self._answer() if self.lease else _status(404)
        if request.method == "PATCH":
            assert request.content_type == MERGE_PATCH
            if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
                return _status(409)
        elif self.lease:
            return _status(409)
        self.version += 1
        kept = (self.lease or {}).get("metadata", {})
        self.lease = {**body, "metadata": {**kept, **body["metadata"], "resourceVersion": str(self.version)}}
        return self._answer()

    def _answer(self) -> web.Response:
        return web.json_response({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **(self.lease or {})})


def _status(code: int) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": f"no: {code}"}, status=code)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def address(server: Server) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@pytest.fixture
async def api(address: str) -> AsyncIterator[Api]:
    found = connect(address)
    yield found
    await found.close()


def connect(address: str) -> Api:
    return Api(client.ApiClient(client.Configuration(host=address)))


async def test_a_lease_is_made_once_and_then_changed(api: Api, server: Server) -> None:
    leases = api.leases("system", "operator")
    assert await leases.read() is None
    made = await leases.write(Lease(holder="a", seconds=15, acquired_at=WHOLE_SECOND, renewed_at=WHOLE_SECOND))
    assert (made.holder, made.seconds, made.version) == ("a", 15, "1")
    assert await leases.read() == made
    changed = await leases.write(replace(made, holder="b", transitions=1))
    assert (changed.holder, changed.transitions, changed.version) == ("b", 1, "2")
    paths = {path for method, path in server.requests if method != "POST"}
    assert paths == {"/apis/coordination.k8s.io/v1/namespaces/system/leases/operator"}


async def test_its_times_have_six_digits_always(api: Api, server: Server) -> None:
    await api.leases("system", "operator").write(Lease(holder="a", renewed_at=WHOLE_SECOND))
    assert server.lease
    assert server.lease["spec"]["renewTime"] == "2026-01-02T03:04:05.000001+00:00"


async def test_what_others_wrote_into_it_stays(api: Api, server: Server) -> None:
    leases = api.leases("system", "operator")
    made = await leases.write(Lease(holder="a"))
    assert server.lease
    server.lease["metadata"]["labels"] = {"team": "ml"}
    await leases.write(made)
    assert server.lease["metadata"]["labels"] == {"team": "ml"}


async def test_who_read_an_older_version_does_not_get_it(api: Api) -> None:
    leases = api.leases("system", "operator")
    made = await leases.write(Lease(holder="a"))
    await leases.write(made)
    for late in (made, Lease(holder="c")):
        with pytest.raises(TemporaryApiError):
            await leases.write(late)


async def test_the_second_operator_works_as_soon_as_the_first_is_stopped(
    address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_operator.election.RETRY_SECONDS", 0.01)
    monkeypatch.setenv(ENV_LEASE, "operator")
    monkeypatch.setenv(ENV_NAMESPACE, "system")
    monkeypatch.setenv(ENV_METRICS_PORT, "0")

    config = OperatorConfig(lease_duration_seconds=3, learning=False)

    async def started(name: str) -> Runtime:
        monkeypatch.setenv(ENV_POD, name)
        store = Store({}, {}, {}, time.monotonic)
        runtime = Runtime(connect(address), store, Inventory({}, {}, config), config)
        await runtime.start()
        return runtime

    one = await started("one")
    await server.until(lambda: _leads(one))
    other = await started("other")
    await server.until(lambda: len([path for method, path in server.requests if method == "GET"]) > 3)
    assert (_leads(one), _leads(other)) == (True, False)
    assert not any(task.done() for task in (*one.tasks, *other.tasks))
    await one.stop()
    await server.until(lambda: _leads(other))
    assert not _leads(one)
    await other.stop()
    assert server.lease
    assert server.lease["spec"]["holderIdentity"] == ""


def _leads(runtime: Runtime) -> bool:
    return "qlora_operator_leader 1.0" in runtime.metrics.render().decode()


async def test_who_does_not_lead_writes_nothing(api: Api, server: Server) -> None:
    api.may_write = lambda: False
    manifest = {"metadata": {"name": "x", "namespace": "team"}}
    for write in (
        api.create_job(manifest),
        api.create_claim_template(manifest),
        api.delete_job("team", "x", "u"),
        api.patch_status(METADATA, {"phase": "Pending"}),
        api.patch_config_map("team", "x", {"a": "b"}),
        api.create_event(METADATA, Event("Normal", "Test", "x")),
    ):
        with pytest.raises(TemporaryApiError, match="isn't the leader"):
            await write
    assert server.requests == []
