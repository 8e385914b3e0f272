"""What goes over the wire to the API server: the Lease, and nothing from an operator that doesn't lead."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from qlora_operator.api import MERGE_PATCH, Api, TemporaryApiError
from qlora_operator.decision import Event
from qlora_operator.election import Lease
from qlorajob.resource import Metadata

WHOLE_SECOND = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
METADATA = Metadata(name="x", namespace="team", uid="u")


class Server:
    """The Lease endpoints of an API server, with optimistic locking; counts every request."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.requests: list[tuple[str, str]] = []
        self.version = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path))
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
async def api(server: Server) -> AsyncIterator[Api]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    found = Api(client.ApiClient(client.Configuration(host=f"http://{host}:{port}")))
    yield found
    await found.close()
    await runner.cleanup()


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
