"""Asks running trainer pods how far they are. The answers reach the status through reconcile, its only writer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import aiohttp
from pydantic import ValidationError

from qlora_operator.metrics import Metrics
from qlora_operator.observed import PodView, pod_view
from qlora_operator.store import Key, Store
from qlorajob.names import METRICS_PORT
from qlorajob.status import Progress

TIMEOUT: Final = aiohttp.ClientTimeout(total=2.0)
AT_ONCE: Final = 32
MAX_BYTES: Final = 64 * 1024
SILENT_FIELDS: Final = {"updated_at", "eta_seconds"}
"""A change in these alone isn't worth a write to etcd."""
logger = logging.getLogger(__name__)


class Poller:
    """One task for all pods: a few hundred small requests every few seconds need no more."""

    def __init__(self, store: Store, metrics: Metrics, changed: Callable[[Key], None], interval: float) -> None:
        self._store = store
        self._metrics = metrics
        self._changed = changed
        self._interval = interval
        self._latest: dict[str, Progress] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)

    def latest(self, pod_uid: str) -> Progress | None:
        """What this pod said last."""
        return self._latest.get(pod_uid)

    async def run(self) -> None:
        """Poll until cancelled."""
        before = time.monotonic()
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            while True:
                await asyncio.sleep(self._interval)
                now = time.monotonic()
                pods = self._running_train_pods()
                self._account(pods, now - before)
                before = now
                await asyncio.gather(*(self._ask(session, key, pod) for key, pod in pods))
                current = {pod.uid for _, pod in pods}
                self._latest = {uid: progress for uid, progress in self._latest.items() if uid in current}

    def _running_train_pods(self) -> list[tuple[Key, PodView]]:
        views = ((key, pod_view(raw)) for key in self._store for raw in self._store.pods(key))
        return [(key, pod) for key, pod in views if pod.phase == "Running" and pod.step == "train"]

    def _account(self, pods: list[tuple[Key, PodView]], seconds: float) -> None:
        for key, pod in pods:
            if pod.gpus:
                self._metrics.gpu_seconds.labels(key.namespace).inc(pod.gpus * seconds)

    async def _ask(self, session: aiohttp.ClientSession, key: Key, pod: PodView) -> None:
        if not pod.ip or pod.deleting:
            return
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with self._limit, session.get(f"http://{host}:{METRICS_PORT}/progress") as response:
                response.raise_for_status()
                progress = Progress.model_validate_json(await response.content.read(MAX_BYTES))
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
            # It may just be starting, or uploading; the next round asks again.
            logger.debug("no progress from pod %s: %s", pod.name, error, extra={"key": str(key)})
            return
        before = self._latest.get(pod.uid)
        self._latest[pod.uid] = progress
        if before is None or before.model_dump(exclude=SILENT_FIELDS) != progress.model_dump(exclude=SILENT_FIELDS):
            self._changed(key)
