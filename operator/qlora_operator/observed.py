"""Jobs and pods as reconcile sees them: parsed once from the API's JSON, frozen after. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, Literal

from pydantic import ValidationError

from qlora_operator.fleet import Fleet
from qlora_operator.pods import CONTAINER
from qlora_vram.observations import Observations
from qlorajob import names
from qlorajob.run import RunReport
from qlorajob.status import Progress

JobState = Literal["active", "suspended", "complete", "failed"]
Raw = Mapping[str, Any]

WARNINGS_ABOUT_STARTS: Final = frozenset(
    {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedCreate"}
)
MAX_DIGITS: Final = 4
"""Of a pod's number of GPUs."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What the cluster says, in warning events, about an object that doesn't get started."""

    message: str = ""
    """The last event's; empty where there is none."""
    lasting: timedelta = timedelta()
    """From the first event to the last."""


@dataclass(frozen=True, slots=True)
class JobView:
    """One batch/v1 Job of ours."""

    name: str
    uid: str
    owner_uid: str
    step: str
    state: JobState
    created_at: datetime | None = None
    finished_at: datetime | None = None
    failure: str = ""
    """Reason of the Failed condition: PodFailurePolicy, BackoffLimitExceeded, DeadlineExceeded."""
    message: str = ""
    deleting: bool = False
    complaint: Complaint = Complaint()
    """About this Job, where it has no pod."""

    @property
    def live(self) -> bool:
        """It has pods, or may get some."""
        return self.state in ("active", "suspended")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a container hasn't started, in the kubelet's or the scheduler's words."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of one of our Jobs."""

    name: str
    uid: str
    job_uid: str
    job_name: str
    step: str
    phase: str
    ip: str = ""
    gpus: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deleting: bool = False
    scheduled: bool = False
    waiting: Waiting | None = None
    exit_code: int | None = None
    termination: str = ""
    """Reason of the terminated state, such as OOMKilled."""
    last_words: str = ""
    """The termination message as it was written."""
    verdict: str = ""
    """Why the cluster ended or refused the pod, in the kubelet's words: `Evicted: The node was low on …`."""
    report: RunReport | None = None
    progress: Progress | None = None
    """What the poller heard last."""
    complaint: Complaint = Complaint()
    """About this pod, where it is stuck before its start."""

    @property
    def live(self) -> bool:
        """It runs, or will."""
        return self.phase in ("Pending", "Running", "Unknown")

    @property
    def stuck_before_start(self) -> bool:
        """It has a node, but no container yet: volumes, sandbox or image are in the making."""
        return (
            self.phase == "Pending"
            and self.scheduled
            and (self.waiting is None or self.waiting.reason in ("ContainerCreating", "PodInitializing"))
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """What in the cluster carries the job's label, whoever owns it; its GPUs, and what is known of earlier runs."""

    jobs: tuple[JobView, ...] = ()
    pods: tuple[PodView, ...] = ()
    fleet: Fleet = field(default_factory=Fleet)
    """The cluster's GPUs."""
    observations: Observations = field(default_factory=Observations)
    """What finished runs took."""
    rivals: tuple[str, ...] = ()
    """Other QLoRAJobs that are at work on the run that would be started now, into the same place."""

    def job(self, name: str) -> JobView | None:
        """The Job of that name."""
        return next((job for job in self.jobs if job.name == name), None)

    def pods_of(self, job: JobView) -> tuple[PodView, ...]:
        """Newest first."""
        mine = [pod for pod in self.pods if pod.job_uid == job.uid]
        return tuple(sorted(mine, key=lambda pod: (pod.created_at is not None, pod.created_at, pod.name), reverse=True))


def observe(jobs: Iterable[Raw], pods: Iterable[Raw]) -> Observed:
    """The views of raw objects."""
    return Observed(tuple(map(job_view, jobs)), tuple(map(pod_view, pods)))


def job_view(raw: Raw) -> JobView:
    """One Job."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    conditions = {
        condition["type"]: condition for condition in status.get("conditions") or () if condition["status"] == "True"
    }
    owner: Raw = next((ref for ref in metadata.get("ownerReferences") or () if ref.get("controller")), {})
    state: JobState = "active"
    finish: Raw = {}
    if "Complete" in conditions:
        state, finish = "complete", conditions["Complete"]
    elif "Failed" in conditions:
        state, finish = "failed", conditions["Failed"]
    elif raw["spec"].get("suspend"):
        state = "suspended"
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=owner.get("uid", ""),
        step=(metadata.get("labels") or {}).get(names.LABEL_STEP, ""),
        state=state,
        created_at=_time(metadata.get("creationTimestamp")),
        finished_at=_time(finish.get("lastTransitionTime")),
        failure=finish.get("reason", "") if state == "failed" else "",
        message=finish.get("message", ""),
        deleting=bool(metadata.get("deletionTimestamp")),
    )


def pod_view(raw: Raw) -> PodView:
    """One pod."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    owner: Raw = next((ref for ref in metadata.get("ownerReferences") or () if ref.get("controller")), {})
    container = _ours(status.get("containerStatuses") or ())
    state = container.get("state") or {}
    ended: Raw = state.get("terminated") or {}
    running: Raw = state.get("running") or {}
    scheduled = _condition(status, "PodScheduled")
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        job_uid=owner.get("uid", ""),
        job_name=owner.get("name", ""),
        step=(metadata.get("labels") or {}).get(names.LABEL_STEP, ""),
        phase=status.get("phase", "Pending"),
        ip=status.get("podIP", ""),
        gpus=_count((metadata.get("annotations") or {}).get(names.ANNOTATION_GPUS, "")),
        created_at=_time(metadata.get("creationTimestamp")),
        started_at=_time(running.get("startedAt") or ended.get("startedAt")),
        finished_at=_time(ended.get("finishedAt")),
        deleting=bool(metadata.get("deletionTimestamp")),
        scheduled=scheduled.get("status") == "True" or bool(raw["spec"].get("nodeName")),
        waiting=_waiting(state, scheduled),
        exit_code=ended.get("exitCode"),
        termination=ended.get("reason", ""),
        last_words=ended.get("message", ""),
        verdict=": ".join(filter(None, (status.get("reason"), status.get("message")))),
        report=parse_report(ended.get("message", "")),
    )


def complaint(events: Iterable[Raw], since: datetime | None = None) -> Complaint:
    """What warning events about one object say of its start, or of its next pod's, `since` the last one has ended."""
    relevant = [
        event
        for event in events
        if event.get("reason") in WARNINGS_ABOUT_STARTS and (since is None or _seen("lastTimestamp", event) >= since)
    ]
    if not relevant:
        return Complaint()
    first = min(_seen("firstTimestamp", event) for event in relevant)
    last = max(relevant, key=partial(_seen, "lastTimestamp"))
    return Complaint(str(last.get("message", "")), _seen("lastTimestamp", last) - first)


def parse_report(message: str) -> RunReport | None:
    """The RunReport in a termination message; None where there is none, or one of another version."""
    if not message.lstrip().startswith("{"):
        return None
    try:
        return RunReport.model_validate_json(message)
    except ValidationError:
        return None


def _waiting(state: Raw, scheduled: Raw) -> Waiting | None:
    if state.get("waiting"):
        return Waiting(state["waiting"].get("reason", ""), state["waiting"].get("message", ""))
    if scheduled.get("status") == "False":
        return Waiting(scheduled.get("reason", "Unschedulable"), scheduled.get("message", ""))
    return None


def _ours(containers: Iterable[Raw]) -> Raw:
    """The trainer's entry: meshes and webhooks add containers of their own."""
    return next((container for container in containers if container.get("name") == CONTAINER), {})


def _condition(status: Raw, kind: str) -> Raw:
    return next((condition for condition in status.get("conditions") or () if condition["type"] == kind), {})


def _seen(which: Literal["firstTimestamp", "lastTimestamp"], event: Raw) -> datetime:
    """Events of the newer kind have one time for both."""
    return datetime.fromisoformat(event.get(which) or event.get("eventTime") or event["metadata"]["creationTimestamp"])


def _count(text: str) -> int:
    """The number in an annotation that anybody may have edited; 0 where it is none."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else 0


def _time(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None
