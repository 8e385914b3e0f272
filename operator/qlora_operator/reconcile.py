"""What should be done about a QLoRAJob, from what is: `reconcile(job, observed, config, now) -> Decision`. Pure.

Level-based: it never asks what just happened, so it may be called at any time, any number of times, after any crash.
Two facts make that safe. A Job's name follows from the inputs and a counter that never counts back, so creating it
twice creates it once. And `status.job` names the one Job that is being waited for: all else that is live is stale.
"""

from __future__ import annotations

from datetime import datetime

from qlora_operator import conditions
from qlora_operator import outcome as outcomes
from qlora_operator.config import OperatorConfig
from qlora_operator.decision import Decision, Event
from qlora_operator.draft import Draft
from qlora_operator.observed import Observed
from qlora_operator.outcome import Kind, Outcome
from qlora_operator.steps import advance
from qlorajob import names
from qlorajob.errors import Reason
from qlorajob.identity import merge_key, prepare_key
from qlorajob.resource import Metadata, QLoRAJob
from qlorajob.run import WARNINGS, Step
from qlorajob.status import Phase, QLoRAJobStatus

MAX_PASSES = 8
"""prepare, train and merge can each end and start the next within one look; more means a bug."""

COLLECTORS = frozenset({"orphan", "foregroundDeletion"})
"""Finalizers of the garbage collector: with --cascade=orphan the Jobs are to stay, with foreground it ends them itself,
and waits for their pods."""
TOLD_AT_CREATION = frozenset({Reason.PREPARING, Reason.QUEUED, Reason.TRAINING, Reason.MERGING})
"""Reasons of ordinary work, which has its event when its Job is created."""


def reconcile(job: QLoRAJob, observed: Observed, config: OperatorConfig, now: datetime) -> Decision:
    """The actions and the status that follow from the job's spec and status, its Jobs and its pods."""
    draft = Draft(job=job, observed=observed, config=config, now=now, status=job.status)
    if job.metadata.deletion_timestamp:
        if COLLECTORS.isdisjoint(job.metadata.finalizers):
            draft.delete_live()  # it waits for somebody else's finalizer, but a GPU shouldn't
        return Decision(job.status, actions=tuple(draft.actions))
    _tell_warnings(draft)
    outcome = _decide(draft)
    if outcome.kind is Kind.FAILED:
        _stick(draft)
    status = conditions.apply(draft.status, outcome, job.metadata.generation, now)
    _tell_change(draft, outcome)
    return Decision(
        status=status,
        actions=tuple(draft.actions),
        events=tuple(draft.events),
        requeue_after=outcome.requeue_after,
        measurements=tuple(draft.measurements),
        observations=tuple(draft.observations),
    )


def reject(metadata: Metadata, status: QLoRAJobStatus, problem: str, now: datetime) -> Decision:
    """For what can't be reconciled at all: a spec this operator doesn't understand, a Job that the cluster refuses."""
    outcome = outcomes.waiting(Phase.FAILED, Reason.INVALID_SPEC, problem)
    return _stalled(metadata, status, outcome, now)


def refused(metadata: Metadata, status: QLoRAJobStatus, problem: str, now: datetime) -> Decision:
    """The API server won't take a Job of ours: a quota, an admission policy, a value it finds invalid."""
    outcome = outcomes.waiting(status.phase or Phase.PENDING, Reason.POD_CREATION_FAILED, problem)
    return _stalled(metadata, status, outcome, now)


def _stalled(metadata: Metadata, status: QLoRAJobStatus, outcome: Outcome, now: datetime) -> Decision:
    ready = conditions.find(status, "Ready")
    told = ready is not None and ready.reason == str(outcome.reason)
    events = () if told else (Event("Warning", str(outcome.reason), outcome.message),)
    return Decision(conditions.apply(status, outcome, metadata.generation, now), events=events)


def _decide(draft: Draft) -> Outcome:
    sticky = _sticky_failure(draft)
    if sticky:
        draft.delete_live()
        return sticky
    prepared = draft.status.prepared
    if prepared and prepared.key != prepare_key(draft.job.spec):
        draft.event("Normal", "SpecChanged", f"The inputs have changed: run {prepared.run_id} makes way for a new one")
        draft.forget_run()
    for _ in range(MAX_PASSES):
        actions = len(draft.actions)
        step = next_step(draft)
        if step is None:
            draft.delete_live()
            return _success(draft)
        outcome = advance(draft, step)
        if outcome:
            return outcome
        del draft.actions[actions:]  # deletions are decided anew from the changed status
    return outcomes.failed(Reason.INTERNAL_ERROR, "The operator goes round in circles: please report this")


def next_step(draft: Draft) -> Step | None:
    """The first step whose result isn't recorded; None when everything the spec asks for is there."""
    status, spec = draft.status, draft.job.spec
    artifacts = status.artifacts
    if status.prepared is None:
        return "prepare"
    if artifacts is None or artifacts.adapter is None:
        return "train"
    if not spec.merge.enabled or conditions.promoted(status) is False:
        return None
    complete = artifacts.merged is not None and (spec.merge.gguf is None or artifacts.gguf is not None)
    return None if complete and status.merge_key == merge_key(spec) else "merge"


def _sticky_failure(draft: Draft) -> Outcome | None:
    """A failure that nobody has done anything about. Otherwise forget it and look at everything again."""
    failure = conditions.find(draft.status, "Failed")
    if failure is None or failure.status != "True":
        return None
    retry_at = draft.job.metadata.annotations.get(names.ANNOTATION_RETRY)
    asked = retry_at is not None and retry_at != draft.status.handled_retry_at
    if draft.status.failed_generation == draft.job.metadata.generation and not asked:
        return outcomes.failed(failure.reason, failure.message)
    draft.event("Normal", "Retrying", "A retry was asked for" if asked else "The spec was edited: trying again")
    draft.set(failed_generation=None, handled_retry_at=retry_at)
    draft.look_again()
    return None


def _stick(draft: Draft) -> None:
    """Remember what was there when it failed: only something new is a reason to try again."""
    draft.set(
        failed_generation=draft.job.metadata.generation,
        handled_retry_at=draft.job.metadata.annotations.get(names.ANNOTATION_RETRY),
    )


def _success(draft: Draft) -> Outcome:
    status = draft.status
    artifacts, prepared = status.artifacts, status.prepared
    assert artifacts is not None  # noqa: S101 (next_step has seen the adapter)
    draft.finish_run(None)
    uri = artifacts.adapter.uri if artifacts.adapter else ""
    if conditions.promoted(status) is False:
        message = f"Trained, but not better than the base model: latest.json hasn't moved; the adapter is at {uri}"
        return outcomes.succeeded(Reason.NOT_BETTER_THAN_BASE, message)
    if prepared and prepared.artifacts:
        return outcomes.succeeded(Reason.ALREADY_TRAINED, f"The finished run was found in S3: the adapter is at {uri}")
    return outcomes.succeeded(Reason.SUCCEEDED, f"The adapter is at {uri}")


def _tell_warnings(draft: Draft) -> None:
    """What pods that have ended say went wrong and was got over: each report once, as long as its Job is there."""
    own = {job.uid for job in draft.observed.jobs if draft.is_own(job)}
    told = draft.status.warned_until
    ended = [
        (pod.finished_at, pod.name, pod.report)
        for pod in draft.observed.pods
        if pod.report and pod.report.warnings and pod.finished_at and pod.job_uid in own
    ]
    for at, name, report in sorted(ended, key=lambda each: each[:2]):
        if told is None or at > told:
            for text in report.warnings[-WARNINGS:]:
                draft.event("Warning", "TrainerWarning", f"{report.step}, pod {name}: {text}")
            draft.set(warned_until=at)


def _tell_change(draft: Draft, outcome: Outcome) -> None:
    """An event for each change of the situation that the steps haven't told about."""
    before = draft.job.status
    ready = conditions.find(before, "Ready")
    if before.phase == outcome.phase and ready and ready.reason == str(outcome.reason):
        return
    if outcome.kind in (Kind.WAITING, Kind.FAILED):
        draft.event("Warning", outcome.reason, outcome.message)
    elif outcome.phase in (Phase.SUSPENDED, Phase.SUCCEEDED, Phase.TRAINING):
        draft.event("Normal", outcome.reason, outcome.message)
    elif outcome.reason not in TOLD_AT_CREATION:
        draft.event("Warning", outcome.reason, outcome.message)
