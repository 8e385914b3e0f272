"""One step at a time: start its Job, watch it, and take in what it reported. Pure.

Each function returns an Outcome to stop at, or None when the status has changed and the next look follows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from qlora_operator import outcome as outcomes
from qlora_operator import problems
from qlora_operator.conditions import summary
from qlora_operator.decision import Measurement
from qlora_operator.draft import Draft
from qlora_operator.fleet import Slot
from qlora_operator.learning import first_attempt
from qlora_operator.less_memory import kept_plan, plan_less, was_out_of_memory
from qlora_operator.manifests import claim_template, merge_job, prepare_job, train_job
from qlora_operator.observed import JobView, PodView
from qlora_operator.outcome import Outcome
from qlora_vram.gpus import CPU
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import merge_key, plan_key, prepare_key
from qlorajob.plan import ModelFacts, Plan
from qlorajob.run import RunReport, Step
from qlorajob.status import MemoryStatus, Phase, RunStatus

REPORT_GRACE: Final = timedelta(seconds=15)
"""A Job can be seen to end before its pod is; after this time the pod is taken for deleted."""
LOOK_AGAIN: Final = 5.0
"""Seconds between two looks at a pod that is slow to start."""

WORKING: Final[dict[Step, Phase]] = {
    "prepare": Phase.PREPARING,
    "train": Phase.TRAINING,
    "merge": Phase.MERGING,
}
STARTING: Final[dict[Step, Phase]] = WORKING | {"train": Phase.QUEUED}
REASONS: Final[dict[Step, Reason]] = {
    "prepare": Reason.PREPARING,
    "train": Reason.TRAINING,
    "merge": Reason.MERGING,
}


def advance(draft: Draft, step: Step) -> Outcome | None:
    """Do what the step needs now."""
    name = draft.outstanding(step)
    job = draft.observed.job(name) if name else None
    suspend = draft.job.spec.suspend
    if job is not None and not draft.is_own(job):
        job = None
    if job is not None and job.state == "complete":
        return _ended(draft, step, job, _take_report)
    if job is not None and job.state == "failed":
        return _ended(draft, step, job, _fail)
    successor = draft.name_of(step, draft.next_number(step))  # there after a crash between creating and recording it
    draft.delete_live(keep=None if suspend else name or successor)
    if name and job is None:  # also while suspended: it may have ended before, and nobody would look for its result
        return _lost(draft, step, name)
    if suspend:
        return _suspend(draft)
    if job is not None and job.deleting:
        return outcomes.working(STARTING[step], REASONS[step], f"Job {job.name} is being deleted; another follows")
    if job is not None:
        return _watch(draft, step, job)
    return START[step](draft)


def _suspend(draft: Draft) -> Outcome:
    draft.set(job=None)
    pods = draft.pods_stopping()
    if pods:
        return outcomes.suspended(f"spec.suspend is true: pod {pods[0].name} is writing a checkpoint and stops")
    return outcomes.suspended("spec.suspend is true: set it to false to go on from the last checkpoint")


# Start


def _start_prepare(draft: Draft) -> Outcome:
    manifest = prepare_job(draft.job, draft.next_number("prepare"), draft.config)
    draft.create("prepare", manifest)
    name = manifest["metadata"]["name"]
    draft.event("Normal", Reason.PREPARING, f"Looking at model, data and output in Job {name}")
    return outcomes.working(Phase.PREPARING, Reason.PREPARING, "Looking at model, data and output")


def _start_train(draft: Draft) -> Outcome:
    prepared, run = draft.status.prepared, draft.status.run
    assert prepared is not None and run is not None  # noqa: S101, PT018
    others = draft.writers_besides(draft.name_of("train", draft.next_number("train")))
    if others:
        return outcomes.working(
            Phase.PENDING, Reason.QUEUED, f"Waiting for {others[0]} of an earlier run or attempt to stop", LOOK_AGAIN
        )
    if draft.observed.rivals:
        return _after(draft.observed.rivals[0], Reason.QUEUED)
    kept = kept_plan(draft)
    planned = kept if kept and _slot(draft, kept) else _plan(draft, prepared.facts)
    if isinstance(planned, DoesNotFit):
        # Not for good: a node with another GPU may come, and what it changes wakes this job.
        draft.set(plan=kept)
        return outcomes.waiting(Phase.PENDING, planned.reason, f"spec.{planned.field}: {planned.message}")
    if planned != draft.status.plan:
        draft.event("Normal", "Planned", planned.reason)
    memory = MemoryStatus(predicted_bytes=planned.predicted_peak_bytes)
    started = RunStatus(
        id=run.id,
        attempt=run.attempt + 1,
        started_at=run.started_at or draft.now,
        plan_key=plan_key(draft.job.spec),
        replans=run.replans if planned == draft.status.plan else 0,
    )
    draft.set(plan=planned, memory=memory, run=started)
    slot = _slot(draft, planned)
    assert slot or not planned.gpus  # noqa: S101 (the plan was made from the same fleet)
    number, progress = draft.next_number("train"), draft.status.progress
    manifest = train_job(draft.job, prepared, planned, number, draft.config, slot, progress)
    draft.create("train", manifest, claim_template(draft.job, slot))
    name = manifest["metadata"]["name"]
    where = f" in queue {draft.job.spec.queue_name}" if draft.job.spec.queue_name else ""
    draft.event("Normal", Reason.QUEUED, f"Run {run.id}, attempt {started.attempt}: created Job {name}{where}")
    return outcomes.working(Phase.QUEUED, Reason.QUEUED, f"Job {name} is created{where}")


def _after(rival: str, reason: Reason) -> Outcome:
    """One run, one process: what the other one writes is found there then."""
    message = f"Waiting for QLoRAJob {rival}, which is at work on the same run into the same output"
    return outcomes.working(Phase.PENDING, reason, message, LOOK_AGAIN)


def _slot(draft: Draft, planned: Plan) -> Slot | None:
    """Where the plan's pod goes; None where it has no GPU, or where that class's nodes are gone."""
    return draft.observed.fleet.slot(planned.gpu_class, planned.gpus, draft.job.spec.resources)


def _plan(draft: Draft, facts: ModelFacts) -> Plan | DoesNotFit:
    spec, fleet = draft.job.spec, draft.observed.fleet
    classes = fleet.classes(spec.resources)
    if classes or spec.resources.gpu_class == CPU:
        return plan(spec, facts, classes, draft.config, observations=draft.observed.observations)
    there = ", ".join(gpu.name for gpu in fleet.classes())
    if not there:
        message = f"this cluster's GPUs are older than compute capability {fleet.minimum_capability}"
        return DoesNotFit(Reason.DOES_NOT_FIT, message, "resources.gpuClass")
    message = f"no node with a GPU matches it and resources.tolerations; the cluster has {there}"
    return DoesNotFit(Reason.DOES_NOT_FIT, message, "resources.nodeSelector")


def _start_merge(draft: Draft) -> Outcome:
    prepared = draft.status.prepared
    assert prepared is not None  # noqa: S101
    others = draft.writers_besides(draft.name_of("merge", draft.next_number("merge")))
    if others:
        return outcomes.working(Phase.PENDING, Reason.MERGING, f"Waiting for {others[0]} to stop", LOOK_AGAIN)
    if draft.observed.rivals:
        return _after(draft.observed.rivals[0], Reason.MERGING)
    manifest = merge_job(draft.job, prepared, draft.next_number("merge"), draft.config)
    draft.create("merge", manifest)
    name = manifest["metadata"]["name"]
    draft.event("Normal", Reason.MERGING, f"Merging the adapter into the base model in Job {name}")
    return outcomes.working(Phase.MERGING, Reason.MERGING, "Merging the adapter into the base model")


START: Final[dict[Step, Callable[[Draft], Outcome]]] = {
    "prepare": _start_prepare,
    "train": _start_train,
    "merge": _start_merge,
}


# Watch


def _watch(draft: Draft, step: Step, job: JobView) -> Outcome:
    pods = draft.observed.pods_of(job)
    pod = next((pod for pod in pods if pod.live and not pod.deleting), None)
    if job.state == "suspended":
        queue = draft.job.spec.queue_name
        who = f"queue {queue}" if queue else "its queue"
        message = f"Waiting for {who} to admit Job {job.name}"
        return outcomes.working(Phase.QUEUED, Reason.QUEUED, message)
    overrun = problems.overrun(pods)
    if overrun:
        draft.delete_live()
        return outcomes.failed(overrun.reason, overrun.message)
    problem = problems.stuck(draft.job.spec, job, pod)
    if problem:
        return outcomes.waiting(STARTING[step], problem.reason, problem.message, LOOK_AGAIN)
    if pod is None:
        return _between_pods(step, job, pods)
    if pod.phase == "Running":
        return _running(draft, step, job, pod)
    if not pod.scheduled:
        phase = Phase.PENDING if step == "prepare" else STARTING[step]
        words = pod.waiting.message if pod.waiting else "waiting for the scheduler"
        reason = Reason.UNSCHEDULABLE if pod.waiting else REASONS[step]
        return outcomes.working(phase, reason, f"Pod {pod.name} has no node yet: {words}")
    return outcomes.working(STARTING[step], REASONS[step], f"Pod {pod.name} is starting", LOOK_AGAIN)


def _between_pods(step: Step, job: JobView, pods: tuple[PodView, ...]) -> Outcome:
    """No pod now: the first is still to come, one ended well and the Job is about to, or it waits before a retry."""
    if pods and pods[0].phase == "Succeeded":
        return outcomes.working(WORKING[step], REASONS[step], f"Pod {pods[0].name} is done", LOOK_AGAIN)
    last = problems.last_failure(pods)
    if last is None:
        return outcomes.working(STARTING[step], REASONS[step], f"Job {job.name} is about to start a pod", LOOK_AGAIN)
    if pods[0].exit_code == ExitCode.INTERRUPTED:
        return outcomes.working(
            STARTING[step], Reason.INTERRUPTED, "Stopped after a checkpoint; another pod goes on", LOOK_AGAIN
        )
    return outcomes.working(STARTING[step], last.reason, f"Will be tried again: {last.message}", LOOK_AGAIN)


def _running(draft: Draft, step: Step, job: JobView, pod: PodView) -> Outcome:
    if step != "train":
        message = {"prepare": "Looking at model, data and output", "merge": "Merging the adapter into the base model"}
        return outcomes.working(WORKING[step], REASONS[step], message[step])
    first = len(draft.observed.pods_of(job)) == 1
    if first and draft.status.phase is not Phase.TRAINING and job.created_at:
        since = pod.started_at or draft.now
        draft.measurements.append(Measurement("queue_seconds", max(0.0, (since - job.created_at).total_seconds())))
    draft.take_progress(pod.progress)
    run, planned = draft.status.run, draft.status.plan
    where = f" on {planned.gpu_class}" if planned else ""
    attempt = run.attempt if run else 1
    return outcomes.working(Phase.TRAINING, Reason.TRAINING, f"Training{where}, attempt {attempt}, in pod {pod.name}")


# End


def _ended(
    draft: Draft, step: Step, job: JobView, take: Callable[[Draft, Step, JobView], Outcome | None]
) -> Outcome | None:
    """Stop what else is live, then take in the end of the step's Job."""
    draft.delete_live(keep=job.name)
    return take(draft, step, job)


def _lost(draft: Draft, step: Step, name: str) -> Outcome | None:
    """The Job, or its report, is gone and its end wasn't seen. Repeat the step; for training, look in S3 first."""
    draft.event("Warning", "JobLost", f"Job {name} is gone before its end was seen: looking again")
    if step == "train":
        draft.look_again()
    else:
        draft.set(job=None)
    return None


def _take_report(draft: Draft, step: Step, job: JobView) -> Outcome | None:
    ended = [pod for pod in draft.observed.pods_of(job) if pod.exit_code == 0]
    if not ended:
        if _just_ended(job, draft.now):
            return outcomes.working(WORKING[step], REASONS[step], "Reading the report", LOOK_AGAIN)
        return _lost(draft, step, job.name)
    report = ended[0].report
    if report is None:
        return outcomes.failed(
            Reason.INTERNAL_ERROR,
            f"The report of pod {ended[0].name} can't be read: "
            f"is {draft.config.trainer_image} of the operator's version?",
        )
    return TAKE[step](draft, report, ended[0])


def _just_ended(job: JobView, now: datetime) -> bool:
    return job.finished_at is None or now - job.finished_at < REPORT_GRACE


def _take_prepare(draft: Draft, report: RunReport, pod: PodView) -> Outcome | None:
    if report.prepared is None:
        return outcomes.failed(Reason.INTERNAL_ERROR, f"Pod {pod.name} succeeded, but reported no result")
    if report.prepared.key != prepare_key(draft.job.spec):
        return outcomes.failed(Reason.INTERNAL_ERROR, f"Pod {pod.name} reported on other inputs than it was given")
    draft.take_prepared(report.prepared)
    draft.event("Normal", "Prepared", summary(report.prepared))
    if report.prepared.artifacts and report.progress:
        draft.set(progress=report.progress)
    return None


def _take_train(draft: Draft, report: RunReport, pod: PodView) -> Outcome | None:
    if report.artifacts is None or report.artifacts.adapter is None:
        return outcomes.failed(Reason.INTERNAL_ERROR, f"Pod {pod.name} succeeded, but reported no adapter")
    draft.add_artifacts(report.artifacts)
    draft.take_progress(report.progress or pod.progress)
    progress = draft.status.progress
    draft.set(progress=progress and progress.model_copy(update={"eta_seconds": 0}))
    draft.set_promoted(report.promoted)
    draft.finish_run(pod.finished_at)
    if report.memory:
        _take_memory(draft, report.memory, pod)
    draft.event("Normal", "Trained", f"The adapter is at {report.artifacts.adapter.uri}")
    return None


def _take_memory(draft: Draft, measured: MemoryStatus, pod: PodView) -> None:
    """The peak and the speed, for the status, the metric and the next plans."""
    planned, progress = draft.status.plan, draft.status.progress
    predicted = measured.predicted_bytes or (planned.predicted_peak_bytes if planned else None)
    speed = progress.tokens_per_second if progress else None
    memory = measured.model_copy(update={"predicted_bytes": predicted, "tokens_per_second": speed})
    draft.set(memory=memory)
    if planned and planned.gpus and predicted and memory.peak_bytes:
        draft.measurements.append(Measurement("vram_prediction_ratio", memory.peak_bytes / predicted))
        observation = first_attempt(draft.job.spec, draft.status, draft.observed.fleet, draft.config, pod.finished_at)
        draft.observations += [observation] if observation else []


def _take_merge(draft: Draft, report: RunReport, pod: PodView) -> Outcome | None:
    wants_gguf = draft.job.spec.merge.gguf is not None
    found = report.artifacts
    if found is None or found.merged is None or (wants_gguf and found.gguf is None):
        return outcomes.failed(Reason.INTERNAL_ERROR, f"Pod {pod.name} succeeded, but reported no merged model")
    draft.add_artifacts(found)
    draft.set(merge_key=merge_key(draft.job.spec))
    draft.event("Normal", "Merged", f"The merged model is at {found.merged.uri}")
    return None


TAKE: Final[dict[Step, Callable[[Draft, RunReport, PodView], Outcome | None]]] = {
    "prepare": _take_prepare,
    "train": _take_train,
    "merge": _take_merge,
}


def _fail(draft: Draft, step: Step, job: JobView) -> Outcome | None:
    pods = draft.observed.pods_of(job)
    seen = any(pod.phase == "Failed" for pod in pods)
    if not seen and job.failure != "DeadlineExceeded" and _just_ended(job, draft.now):
        return outcomes.working(WORKING[step], REASONS[step], "Reading the report", LOOK_AGAIN)
    last = next((pod for pod in pods if pod.report), None)
    if step == "train":
        draft.finish_run(job.finished_at)
        if last and last.report:
            draft.take_progress(last.report.progress)
        if was_out_of_memory(job, pods):
            return plan_less(draft, job, pods)
    problem = problems.job_failure(draft.job.spec, step, job, pods)
    return outcomes.failed(problem.reason, problem.message)
