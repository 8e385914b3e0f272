"""kopf's side: keep indexes, and queue the QLoRAJob that an event is about.

Run with `kopf run -m qlora_operator.handlers`: never `kopf run file.py`, which puts the file's folder on sys.path.

Only raw event handlers and indexes are used, so kopf writes nothing into objects: no finalizers, no annotations.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any

import kopf
from aiohttp import web

from qlora_operator.absence import Absence
from qlora_operator.api import Api, ApiError
from qlora_operator.config import OperatorConfig
from qlora_operator.controller import Controller
from qlora_operator.election import Leadership, lead
from qlora_operator.experience import Experience
from qlora_operator.inventory import Inventory
from qlora_operator.metrics import METRICS_PORT, Metrics, NamespacePhase
from qlora_operator.progress import Poller
from qlora_operator.store import Key, Raw, Store
from qlora_operator.workqueue import WorkQueue
from qlorajob import names

ENV_NAMESPACE, ENV_POD = "QLORA_NAMESPACE", "QLORA_POD"
"""The operator's own namespace, where its Lease and its observations are, and its pod. Without it there is neither."""
ENV_LEASE = "QLORA_LEASE"
"""Name of the Lease that the acting operator holds."""
ENV_METRICS_PORT = "QLORA_OPERATOR_METRICS_PORT"
"""Where METRICS_PORT isn't free."""
CHATTY_LOGGERS = ("kopf.objects", "kopf.activities.probe", "aiohttp.access")
"""A line for each watch event and each probe says nothing; ours say what was decided and done."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Runtime:
    """What lives as long as the operator."""

    def __init__(self, api: Api, store: Store, inventory: Inventory, config: OperatorConfig) -> None:
        self.api = api
        self.inventory = inventory
        self._store = store
        self._leadership = _leadership(api, config)
        self._config = config
        api.may_write = self._leads
        self.metrics = Metrics(lambda: phases(store) if self._leads() else [])
        self.metrics.leader.set_function(self._leads)
        self.poller = Poller(store, self.metrics, self._changed, config.progress_interval_seconds)
        self.absence = Absence(store, api.present, self._changed)
        namespace = os.environ.get(ENV_NAMESPACE) if config.learning else None
        experience = Experience(api, namespace, config.trainer_image, time.monotonic)
        controller = Controller(api, store, inventory.fleet, experience, config, self.metrics, self.poller.latest)
        self.queue: WorkQueue[Key] = WorkQueue(
            controller.look,
            backoff_seconds=config.retry_backoff_seconds,
            backoff_max_seconds=config.retry_backoff_max_seconds,
        )
        self.tasks: list[asyncio.Task[None]] = []
        self.server: web.AppRunner | None = None

    def _changed(self, key: Key) -> None:
        self.queue.add(key)

    def gpus_changed(self) -> None:
        """Look again at every job that can't start for want of a GPU."""
        for key in self._store:
            if is_stalled_without_job(self._store.qlorajob(key) or {}):
                self.queue.add(key)

    def _leads(self) -> bool:
        """Alone, or elected."""
        return self._leadership is None or self._leadership.holds

    async def _work(self) -> None:
        """What only the leader does."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.queue.run(), name="workers")
            group.create_task(self.poller.run(), name="poller")
            group.create_task(self.absence.run(), name="absence")

    def heard(self, kind: str | None, key: Key) -> None:
        """An event about the QLoRAJob or its children. Those without a kind are kopf's listings."""
        if kind is None:
            self.absence.listed()
        self.queue.add(key)

    async def start(self) -> None:
        """Start the election or, without one, the work; and the metrics server.

        On standby the indexes are kept, and each event puts its key into the queue: so who begins to lead looks at
        everything, and knows everything.
        """
        seconds = self._config.lease_duration_seconds
        work = lead(self._leadership, seconds, self._work) if self._leadership else self._work()
        self.tasks = [asyncio.create_task(work, name="work")]
        app = web.Application()
        app.router.add_get("/metrics", self._serve_metrics)
        self.server = web.AppRunner(app, access_log=None, handle_signals=False)
        await self.server.setup()
        await web.TCPSite(self.server, None, int(os.environ.get(ENV_METRICS_PORT, METRICS_PORT))).start()

    async def stop(self) -> None:
        """End all of it."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self._leadership:
            with contextlib.suppress(ApiError):  # then it runs out
                await self._leadership.release()
        if self.server:
            await self.server.cleanup()
        await self.api.close()

    async def _serve_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _leadership(api: Api, config: OperatorConfig) -> Leadership | None:
    """None where nothing says which Lease to hold: there is one operator then."""
    namespace, name = os.environ.get(ENV_NAMESPACE), os.environ.get(ENV_LEASE)
    if not (namespace and name):
        return None
    # A container that is started again is the same candidate: what it was is dead.
    identity = os.environ.get(ENV_POD) or f"{socket.gethostname()}-{os.getpid()}"
    return Leadership(api.leases(namespace, name), identity, config.lease_duration_seconds, time.monotonic)


def phases(store: Store) -> list[NamespacePhase]:
    """Namespace and phase of every QLoRAJob."""
    found = []
    for key in store:
        raw: Raw = store.qlorajob(key) or {}
        found.append((key.namespace, (raw.get("status") or {}).get("phase") or "Pending"))
    return found


def is_stalled_without_job(raw: Raw) -> bool:
    """It has been prepared, and waits. It may have a plan, whose GPUs are gone."""
    status: Raw = raw.get("status") or {}
    stalled = any(c["type"] == "Stalled" and c["status"] == "True" for c in status.get("conditions") or ())
    return stalled and bool(status.get("prepared")) and not status.get("job")


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: Any, **indexes: Any) -> None:
    """Configure kopf and start everything else. A wrong configuration or a missing CRD ends the process."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    settings.posting.enabled = False
    settings.scanning.disabled = True  # no rights on CRDs and namespaces needed
    settings.peering.standalone = True
    settings.watching.server_timeout = 600
    settings.watching.label_selectors["batch", "jobs"] = names.LABEL_JOB
    settings.watching.label_selectors["", "pods"] = names.LABEL_JOB
    store = Store(indexes["qlorajobs"], indexes["jobs"], indexes["pods"], time.monotonic)
    try:
        config = OperatorConfig.load()
        api = await Api.connect()
        await api.check_crd()
    except Exception as error:
        raise kopf.PermanentError(f"can't start: {error}") from error
    # Empty where the modules node_handlers and slice_handlers aren't loaded.
    inventory = Inventory(indexes.get("nodes", {}), indexes.get("slices", {}), config)
    memo.runtime = Runtime(api, store, inventory, config)
    await memo.runtime.start()


@kopf.on.cleanup()
async def stop(memo: Any, **_: Any) -> None:
    """Let go of sockets and tasks; Jobs go on by themselves."""
    runtime: Runtime | None = memo.get("runtime")
    if runtime:
        await runtime.stop()


@kopf.on.probe(id="tasks")
async def alive(memo: Any, **_: Any) -> str:
    """/healthz fails when a background task has ended, so that the kubelet restarts the pod."""
    ended = [task.get_name() for task in memo.runtime.tasks if task.done()]
    if ended:
        raise kopf.PermanentError(f"not running: {', '.join(ended)}")
    return "running"


@kopf.index(names.GROUP, names.VERSION, names.PLURAL, id="qlorajobs")
def index_qlorajob(namespace: str | None, name: str, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
    """QLoRAJobs by key."""
    return {Key(namespace or "", name): dict(body)}


@kopf.index("batch", "v1", "jobs", id="jobs", labels={names.LABEL_JOB: kopf.PRESENT})
def index_job(namespace: str | None, labels: kopf.Labels, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
    """Jobs by the QLoRAJob they belong to."""
    return {Key(namespace or "", labels[names.LABEL_JOB]): dict(body)}


@kopf.index("", "v1", "pods", id="pods", labels={names.LABEL_JOB: kopf.PRESENT})
def index_pod(namespace: str | None, labels: kopf.Labels, body: kopf.Body, **_: Any) -> dict[Key, Raw]:
    """Pods by the QLoRAJob they belong to."""
    return {Key(namespace or "", labels[names.LABEL_JOB]): dict(body)}


@kopf.on.event(names.GROUP, names.VERSION, names.PLURAL)
def qlorajob_event(type: str | None, namespace: str | None, name: str, memo: Any, **_: Any) -> None:  # noqa: A002
    """The object itself has changed."""
    memo.runtime.heard(type, Key(namespace or "", name))


@kopf.on.event("batch", "v1", "jobs", labels={names.LABEL_JOB: kopf.PRESENT})
@kopf.on.event("", "v1", "pods", labels={names.LABEL_JOB: kopf.PRESENT})
def child_event(type: str | None, namespace: str | None, labels: kopf.Labels, memo: Any, **_: Any) -> None:  # noqa: A002
    """Something that belongs to the object has changed."""
    memo.runtime.heard(type, Key(namespace or "", labels[names.LABEL_JOB]))
