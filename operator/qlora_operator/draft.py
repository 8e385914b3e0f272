"""The status in the making during one reconcile, and what it knows about the job's own Jobs. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from qlora_operator import conditions
from qlora_operator.config import OperatorConfig
from qlora_operator.decision import Action, CreateClaimTemplate, CreateJob, DeleteJob, Event, Measurement
from qlora_operator.manifests import child_name
from qlora_operator.observed import JobView, Observed, PodView
from qlora_operator.placement import Manifest
from qlora_vram.observations import Observation
from qlorajob.identity import merge_key, prepare_key
from qlorajob.resource import QLoRAJob
from qlorajob.run import Step
from qlorajob.status import Artifacts, HistoryEntry, Prepared, Progress, QLoRAJobStatus, RunStatus

MAX_HISTORY = 10


@dataclass(slots=True)
class Draft:
    """One reconcile's working copy: the status so far, and the actions and events that go with it."""

    job: QLoRAJob
    observed: Observed
    config: OperatorConfig
    now: datetime
    status: QLoRAJobStatus
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)

    def set(self, **fields: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=fields)

    def event(self, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Tell about a change that this very reconcile makes."""
        self.events.append(Event(kind, str(reason), message))

    # Jobs

    def name_of(self, step: Step, number: int) -> str:
        """The name of the step's `number`th Job, for the current inputs."""
        return child_name(self.job, step, self._identity(step), number)

    def _identity(self, step: Step) -> str:
        if step == "prepare":
            return prepare_key(self.job.spec)
        assert self.status.prepared is not None  # noqa: S101 (train and merge come after prepare)
        return self.status.prepared.run_id + (merge_key(self.job.spec) if step == "merge" else "")

    def outstanding(self, step: Step) -> str | None:
        """The name of the Job that this step waits for, when one was created for the current inputs."""
        name = self.name_of(step, self.status.attempts.get(step, 0))
        return name if self.status.job == name else None

    def is_own(self, job: JobView) -> bool:
        """It belongs to this very object, not to a predecessor of the same name."""
        return job.owner_uid == self.job.metadata.uid

    def create(self, step: Step, manifest: Manifest, template: Manifest | None = None) -> None:
        """Create the step's next Job, after the claim template that it needs, and wait for it from now on."""
        if template:
            self.actions.append(CreateClaimTemplate(template))
        action = CreateJob(manifest)
        self.actions.append(action)
        attempts = dict(self.status.attempts) | {step: self.next_number(step)}
        self.set(attempts=attempts, job=action.name)

    def next_number(self, step: Step) -> int:
        """The number of the Job that would be created next."""
        return self.status.attempts.get(step, 0) + 1

    def delete_live(self, *, keep: str | None = None) -> bool:
        """Stop every Job of ours but `keep`. True when something of ours is being stopped."""
        stopping = False
        for job in self.observed.jobs:
            if not self.is_own(job) or job.name == keep:
                continue
            stopping = stopping or job.live or job.deleting
            if job.live and not job.deleting:
                self.actions.append(DeleteJob(job.name, job.uid))
        return stopping

    def writers_besides(self, keep: str) -> tuple[str, ...]:
        """Names of Jobs and pods, of this job or of a predecessor of the same name, that may still write to S3."""
        steps = ("train", "merge")
        jobs = (
            job.name
            for job in self.observed.jobs
            if job.step in steps and job.name != keep and (job.live or job.deleting)
        )
        kept = self.observed.job(keep)
        pods = (
            pod.name
            for pod in self.observed.pods
            if pod.step in steps and pod.live and (kept is None or pod.job_uid != kept.uid)
        )
        return (*jobs, *pods)

    def pods_stopping(self) -> tuple[PodView, ...]:
        """Pods that still run although nothing should."""
        return tuple(pod for pod in self.observed.pods if pod.live)

    # Runs

    def look_again(self) -> None:
        """Have prepare look at inputs and output once more. It finds what is finished, so nothing trains twice."""
        self.set(prepared=None, job=None)

    def forget_run(self) -> None:
        """The inputs have changed: file the current run away and start from nothing."""
        self._file_run()
        self.set(run=None, prepared=None, plan=None, progress=None, memory=None, artifacts=None, job=None)
        self._forget_verdicts()

    def take_prepared(self, prepared: Prepared) -> None:
        """Record what prepare found; a new run id files the old run away."""
        run = self.status.run
        if run is None or run.id != prepared.run_id:
            if run is not None:
                self._file_run()
                self.set(plan=None, progress=None, memory=None)
                self._forget_verdicts()
            run = RunStatus(id=prepared.run_id)
        history = tuple(entry for entry in self.status.history if entry.id != prepared.run_id)
        self.set(run=run, prepared=prepared, artifacts=prepared.artifacts, history=history, job=None)
        if prepared.artifacts:
            self.set_promoted(prepared.promoted)
            self.set(merge_key=prepared.merge_key)

    def take_progress(self, progress: Progress | None) -> None:
        """What the trainer said. Until a process has saved a checkpoint, the run's newest is that of the one before."""
        known = self.status.progress
        if progress and known and progress.checkpoint is None:
            progress = progress.model_copy(update={"checkpoint": known.checkpoint})
        if progress:
            self.set(progress=progress)

    def set_promoted(self, value: bool | None) -> None:
        """Record the gate's verdict; None for no gate."""
        self.status = conditions.with_promoted(self.status, value, self.job.metadata.generation, self.now)

    def finish_run(self, finished_at: datetime | None) -> None:
        """The run has ended; the first end counts."""
        if self.status.run and self.status.run.finished_at is None:
            self.set(run=self.status.run.model_copy(update={"finished_at": finished_at or self.now}))

    def add_artifacts(self, found: Artifacts) -> None:
        """What a report names replaces what was known; what it doesn't name stays."""
        known = self.status.artifacts or Artifacts()
        named = {name: value for name in Artifacts.model_fields if (value := getattr(found, name)) is not None}
        self.set(artifacts=known.model_copy(update=named))

    def _forget_verdicts(self) -> None:
        self.set(merge_key=None)
        self.set_promoted(None)

    def _file_run(self) -> None:
        run, progress, artifacts = self.status.run, self.status.progress, self.status.artifacts
        if run is None:
            return
        outcome: Literal["Succeeded", "Failed", "Replaced"] = "Replaced"
        if artifacts and artifacts.adapter:
            outcome = "Succeeded"
        elif conditions.is_true(self.status, "Failed"):
            outcome = "Failed"
        entry = HistoryEntry(
            id=run.id,
            outcome=outcome,
            finished_at=run.finished_at or self.now,
            loss=progress.loss if progress else None,
            eval_loss=progress.eval_loss if progress else None,
            adapter=artifacts.adapter.uri if artifacts and artifacts.adapter else None,
        )
        self.set(history=(entry, *self.status.history)[:MAX_HISTORY])
