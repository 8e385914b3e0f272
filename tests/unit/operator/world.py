"""A made-up cluster for reconcile: keeps Jobs and pods, applies decisions, and plays Job controller and trainer.

Small enough to trust, and honest about what matters: Jobs are created by name, deletion takes the pods a moment later,
and a step's end is a pod with an exit code and a report.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_operator.config import OperatorConfig
from qlora_operator.decision import Action, CreateClaimTemplate, Decision, DeleteJob, Event
from qlora_operator.fleet import Fleet
from qlora_operator.observed import JobView, Observed, PodView, Waiting
from qlora_operator.reconcile import reconcile
from qlora_vram.observations import Observations
from qlorajob.errors import ExitCode
from qlorajob.identity import prepare_key
from qlorajob.names import LABEL_STEP
from qlorajob.resource import QLoRAJob, parse
from qlorajob.run import RunReport
from qlorajob.status import Condition, Progress, QLoRAJobStatus
from tests.support.live import merged
from tests.support.reports import merge_report, prepare_report, train_report

START = datetime(2026, 1, 1, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "model": {"uri": "s3://models/tiny"},
    "dataset": {"uri": "s3://datasets/rows"},
    "output": {"uri": "s3://adapters/x", "credentialsSecretRef": {"name": "s3-credentials"}},
    "resources": {"gpuClass": "cpu"},
}


def qlorajob(spec: dict[str, Any] | None = None, uid: str = "u1", generation: int = 1, name: str = "x") -> QLoRAJob:
    return parse(
        {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": name, "namespace": "team", "uid": uid, "generation": generation},
            "spec": merged(SPEC, spec or {}),
        }
    )


@dataclass
class World:
    """One QLoRAJob and what belongs to it."""

    job: QLoRAJob = field(default_factory=qlorajob)
    config: OperatorConfig = field(default_factory=OperatorConfig)
    fleet: Fleet = field(default_factory=Fleet)
    observations: Observations = field(default_factory=lambda: Observations(trainer=OperatorConfig().trainer_image))
    jobs: dict[str, JobView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    now: datetime = START
    created: list[str] = field(default_factory=list)
    recorded: set[str] = field(default_factory=set)
    rivals: tuple[str, ...] = ()
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def status(self) -> QLoRAJobStatus:
        return self.job.status

    @property
    def observed(self) -> Observed:
        return Observed(
            tuple(self.jobs.values()), tuple(self.pods.values()), self.fleet, self.observations, self.rivals
        )

    def look(self, *, record: bool = True) -> Decision:
        """One reconcile, carried out. Without `record` the operator dies before it writes the status."""
        self.now += timedelta(seconds=1)
        decision = reconcile(self.job, self.observed, self.config, self.now)
        for action in decision.actions:
            self._carry_out(action)
        for observation in decision.observations:
            self.observations = self.observations.including(observation)
        if record:
            self.job = self.job.model_copy(update={"status": QLoRAJobStatus.model_validate(decision.status.to_wire())})
            self.events += decision.events
            self.recorded |= {self.status.job} if self.status.job else set()
        return decision

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, CreateClaimTemplate):
            self.manifests[action.name] = action.manifest
            return
        if isinstance(action, DeleteJob):
            if action.name in self.jobs and self.jobs[action.name].uid == action.uid:
                del self.jobs[action.name]
            return
        if action.name in self.jobs:
            return
        self.created.append(action.name)
        self.manifests[action.name] = action.manifest
        metadata, spec = action.manifest["metadata"], action.manifest["spec"]
        view = JobView(
            name=action.name,
            uid=f"job-{next(self._numbers)}",
            owner_uid=metadata["ownerReferences"][0]["uid"],
            step=metadata["labels"][LABEL_STEP],
            state="suspended" if spec.get("suspend") else "active",
            created_at=self.now,
        )
        self.jobs[action.name] = view
        if view.state == "active":
            self.add_pod(view)

    def add_pod(self, job: JobView) -> PodView:
        name = f"{job.name}-{next(self._numbers)}"
        pod = PodView(name, f"uid-{name}", job.uid, job.name, job.step, "Pending", created_at=self.now)
        self.pods[name] = pod
        return pod

    # What others do

    def edit(self, spec: dict[str, Any] | None = None, annotations: dict[str, str] | None = None) -> None:
        """A user changes the object; the generation follows the spec."""
        metadata = self.job.metadata
        if annotations:
            metadata = metadata.model_copy(update={"annotations": {**metadata.annotations, **annotations}})
        new = self.job
        if spec is not None:
            parsed = qlorajob(merged(self.job.spec.to_wire(), spec))
            new = new.model_copy(update={"spec": parsed.spec})
            metadata = metadata.model_copy(update={"generation": metadata.generation + 1})
        self.job = new.model_copy(update={"metadata": metadata})

    def admit(self) -> None:
        """Kueue lets the held Jobs go."""
        for job in [job for job in self.jobs.values() if job.state == "suspended"]:
            self.jobs[job.name] = replace(job, state="active")
            self.add_pod(self.jobs[job.name])

    def collect(self) -> None:
        """Pods of Jobs that are gone get their SIGTERM and go."""
        uids = {job.uid for job in self.jobs.values()}
        self.pods = {name: pod for name, pod in self.pods.items() if pod.job_uid in uids}

    def live(self, step: str) -> list[JobView]:
        return [job for job in self.jobs.values() if job.step == step and job.live]

    def pod(self, step: str) -> PodView:
        """The live pod of the step."""
        return next(pod for pod in self.pods.values() if pod.step == step and pod.live)

    def change(self, step: str, **fields: Any) -> None:
        """Change the live pod of the step."""
        pod = self.pod(step)
        self.pods[pod.name] = replace(pod, **fields)

    def run(self, step: str = "train", progress: Progress | None = None) -> None:
        self.change(step, phase="Running", scheduled=True, started_at=self.now, progress=progress)

    def wait_in(self, step: str, reason: str, message: str, *, scheduled: bool = True) -> None:
        self.change(step, waiting=Waiting(reason, message), scheduled=scheduled)

    def end(self, step: str, code: int, report: RunReport | None = None, **fields: Any) -> None:
        """The step's pod ends, and its Job as podFailurePolicy says."""
        pod = self.pod(step)
        job = self.jobs[pod.job_name]
        ended = {"exit_code": code, "report": report, "finished_at": self.now} | fields
        self.pods[pod.name] = replace(pod, phase="Failed" if code else "Succeeded", **ended)
        if code == ExitCode.DONE:
            self.jobs[job.name] = replace(job, state="complete", finished_at=self.now)
        elif code in (ExitCode.INVALID, ExitCode.OUT_OF_MEMORY):
            self.fail_job(job.name, "PodFailurePolicy")

    def fail_job(self, name: str, reason: str, message: str = "") -> None:
        self.jobs[name] = replace(
            self.jobs[name], state="failed", failure=reason, message=message, finished_at=self.now
        )

    # Whole steps

    def prepare(self, run_id: str = "run1", **fields: Any) -> None:
        self.look()
        self.end("prepare", 0, prepare_report(prepare_key(self.job.spec), run_id, **fields))
        self.look()

    def train(self, run_id: str = "run1", **fields: Any) -> None:
        self.run()
        self.look()
        self.end("train", 0, train_report(run_id, **fields))
        self.look()

    def merge(self, run_id: str = "run1", **fields: Any) -> None:
        self.end("merge", 0, merge_report(run_id, **fields))
        self.look()

    # Reading

    def condition(self, kind: str) -> Condition | None:
        return next((condition for condition in self.status.conditions if condition.type == kind), None)

    def true(self) -> set[str]:
        """Types of the conditions that hold."""
        return {condition.type for condition in self.status.conditions if condition.status == "True"}

    def reason(self) -> str:
        ready = self.condition("Ready")
        assert ready is not None
        return ready.reason

    def message(self) -> str:
        ready = self.condition("Ready")
        assert ready is not None
        return ready.message


def trained(spec: dict[str, Any] | None = None) -> World:
    """A world whose run has just been trained."""
    world = World(qlorajob(spec))
    world.prepare()
    world.train()
    return world


def training(spec: dict[str, Any] | None = None) -> World:
    """A world whose run is being trained."""
    world = World(qlorajob(spec))
    world.prepare()
    world.run()
    world.look()
    return world
