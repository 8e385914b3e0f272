"""One look at one QLoRAJob: read, decide, act, write the status, tell. All decisions are reconcile's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from qlora_operator.api import Api, ApiError, PermanentApiError
from qlora_operator.config import OperatorConfig
from qlora_operator.decision import CreateClaimTemplate, CreateJob, Decision
from qlora_operator.experience import Experience
from qlora_operator.fleet import Fleet
from qlora_operator.metrics import Metrics
from qlora_operator.observed import JobView, Observed, PodView, complaint, observe
from qlora_operator.patching import merge_patch
from qlora_operator.reconcile import reconcile, refused, reject
from qlora_operator.rivals import Rivals, started_run
from qlora_operator.store import Key, Raw, Store
from qlorajob.resource import InvalidManifest, Metadata, QLoRAJob, parse
from qlorajob.status import Progress, QLoRAJobStatus

SLOW_START: Final = timedelta(seconds=4)
"""A pod without a container, or a Job without a pod, for so long is worth a look at its events."""
REFUSED_RETRY: Final = 30.0
logger = logging.getLogger(__name__)


class Controller:
    """Carries out decisions. `fleet` tells the cluster's GPUs, `experience` what runs took, `progress` what a pod (by
    uid) said last."""

    def __init__(
        self,
        api: Api,
        store: Store,
        fleet: Callable[[], Fleet],
        experience: Experience,
        config: OperatorConfig,
        metrics: Metrics,
        progress: Callable[[str], Progress | None],
    ) -> None:
        self._api = api
        self._store = store
        self._fleet = fleet
        self._experience = experience
        self._config = config
        self._metrics = metrics
        self._progress = progress
        self._rivals = Rivals(store)

    async def look(self, key: Key) -> float | None:
        """Bring the QLoRAJob a step further. Returns the seconds after which to look again, if it should."""
        with self._metrics.reconcile_seconds.time():
            raw = self._store.qlorajob(key)
            if raw is None:
                return None
            now = datetime.now(UTC).replace(microsecond=0)  # as metav1.Time
            try:
                job = parse(raw)
            except InvalidManifest as error:
                metadata = Metadata.model_validate(raw["metadata"])
                status = _status_of(raw)
                return await self._write(key, raw, metadata, reject(metadata, status, "; ".join(error.problems), now))
            decision = self._decide(key, job, await self._observe(key, now), now)
            try:
                return await self._carry_out(key, raw, job, decision, now)
            finally:
                self._rivals.started(key)

    def _decide(self, key: Key, job: QLoRAJob, observed: Observed, now: datetime) -> Decision:
        """Decide again where others are at work on the run that is to be started: that is rare, and takes a search."""
        decision = reconcile(job, observed, self._config, now)
        run = started_run(decision)
        if run is None:
            return decision
        others = self._rivals.of(key, run)
        if others:
            return reconcile(job, dataclasses.replace(observed, rivals=others), self._config, now)
        self._rivals.start(key, run)
        return decision

    async def _carry_out(self, key: Key, raw: Raw, job: QLoRAJob, decision: Decision, now: datetime) -> float | None:
        try:
            await self._act(key, decision)
        except PermanentApiError as error:
            problem = f"The API server refuses a Job: {error}"
            await self._write(key, raw, job.metadata, refused(job.metadata, job.status, problem, now))
            return REFUSED_RETRY
        for observation in decision.observations:
            await self._experience.add(observation)
        return await self._write(key, raw, job.metadata, decision)

    async def _act(self, key: Key, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, CreateJob):
                created = await self._api.create_job(action.manifest)
                if created:
                    self._store.created_job(key, created)
                    logger.info("created Job %s", action.name, extra={"key": str(key)})
            elif isinstance(action, CreateClaimTemplate):
                await self._api.create_claim_template(action.manifest)
            else:
                await self._api.delete_job(key.namespace, action.name, action.uid)
                self._store.deleted_job(key, action.uid)
                logger.info("deleted Job %s", action.name, extra={"key": str(key)})

    async def _write(self, key: Key, raw: Raw, metadata: Metadata, decision: Decision) -> float | None:
        patch = merge_patch(raw.get("status") or {}, decision.status.to_wire())
        if patch:
            patched = await self._api.patch_status(metadata, patch)
            if patched is None:
                return None
            self._store.wrote_qlorajob(key, patched)
            logger.debug("wrote status %s", sorted(patch), extra={"key": str(key)})
        self._metrics.record(decision.measurements)
        for event in decision.events:
            logger.info("%s: %s", event.reason, event.message, extra={"key": str(key)})
            try:
                await self._api.create_event(metadata, event)
            except ApiError as error:  # events are told once, and never worth a second look
                logger.warning("event %s is lost: %s", event.reason, error, extra={"key": str(key)})
        return decision.requeue_after

    async def _observe(self, key: Key, now: datetime) -> Observed:
        """The views, with what only a request can tell: progress, and warnings about slow starts."""
        plain = observe(self._store.jobs(key), self._store.pods(key))
        pods = [await self._with_news(key, pod, now) for pod in plain.pods]
        jobs = [await self._with_complaint(key, job, plain, now) for job in plain.jobs]
        return Observed(tuple(jobs), tuple(pods), self._fleet(), await self._experience.known())

    async def _with_news(self, key: Key, pod: PodView, now: datetime) -> PodView:
        changes: dict[str, Any] = {}
        if pod.phase == "Running":
            changes["progress"] = self._progress(pod.uid)
        if pod.stuck_before_start and _older(pod.created_at, now):
            changes["complaint"] = complaint(await self._api.warnings(key.namespace, pod.uid))
        return dataclasses.replace(pod, **changes) if changes else pod

    async def _with_complaint(self, key: Key, job: JobView, observed: Observed, now: datetime) -> JobView:
        pods = observed.pods_of(job)
        waits = not pods or all(pod.phase == "Failed" for pod in pods)  # for its first pod, or for the next
        if job.state != "active" or not waits or not _older(job.created_at, now):
            return job
        since = pods[0].finished_at or pods[0].created_at if pods else None
        return dataclasses.replace(job, complaint=complaint(await self._api.warnings(key.namespace, job.uid), since))


def _older(created_at: datetime | None, now: datetime) -> bool:
    return created_at is not None and now - created_at >= SLOW_START


def _status_of(raw: Raw) -> QLoRAJobStatus:
    """The status alone, where the spec can't be read."""
    try:
        return QLoRAJobStatus.model_validate(raw.get("status") or {}, extra="ignore")
    except ValueError:
        return QLoRAJobStatus()
