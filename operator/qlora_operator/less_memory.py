"""After a training Job was out of GPU memory: the run goes on from its newest checkpoint, with a plan that takes less.

The smaller plan is in the status, and `status.run` says what it was made for: so it holds through restarts, suspension
and lost writes, until that part of the spec is edited. Pure.
"""

from __future__ import annotations

from qlora_operator import outcome as outcomes
from qlora_operator.decision import Measurement
from qlora_operator.draft import Draft
from qlora_operator.learning import out_of_memory
from qlora_operator.observed import JobView, PodView
from qlora_operator.outcome import Outcome
from qlora_vram.outcome import DoesNotFit
from qlora_vram.replan import replan
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import plan_key
from qlorajob.plan import Plan

MATCHED = f"exit code {int(ExitCode.OUT_OF_MEMORY)} matching"
"""In the message of a Job that its podFailurePolicy ended, where the pod itself is gone."""


def was_out_of_memory(job: JobView, pods: tuple[PodView, ...]) -> bool:
    """The Job's pod said so with its exit code; such a pod is its Job's last."""
    return any(pod.exit_code == ExitCode.OUT_OF_MEMORY for pod in pods) or (not pods and MATCHED in job.message)


def plan_less(draft: Draft, job: JobView, pods: tuple[PodView, ...]) -> Outcome | None:
    """None where the run goes on, with what is in the status now; otherwise its end."""
    spec, planned, run, prepared = draft.job.spec, draft.status.plan, draft.status.run, draft.status.prepared
    if planned is None or run is None or prepared is None or not planned.gpus:
        return outcomes.failed(Reason.OUT_OF_MEMORY, _without_gpu(planned, pods))
    fleet = draft.observed.fleet
    ended_at = next((pod.finished_at for pod in pods if pod.finished_at), job.finished_at) or draft.now
    seen = out_of_memory(spec, planned, prepared.facts, fleet, draft.config, ended_at)
    known = draft.observed.observations
    if seen:
        draft.observations.append(seen)
        known = known.including(seen)  # as the next look will find it, should this one's status get lost
    key, classes = plan_key(spec), fleet.classes(spec.resources)
    if run.plan_key not in (None, key) or planned.gpu_class not in [gpu.name for gpu in classes]:
        message = f"Out of GPU memory on {planned.gpu_class}: planned anew, for what the spec and the cluster say now"
        draft.event("Warning", Reason.OUT_OF_MEMORY, message)
        draft.set(job=None, run=run.model_copy(update={"replans": 0, "finished_at": None}))
        return None
    less = replan(planned, spec, prepared.facts, classes, draft.config, observations=known)
    if isinstance(less, DoesNotFit):
        return outcomes.failed(less.reason, f"spec.{less.field}: {less.message}")
    draft.event("Warning", Reason.OUT_OF_MEMORY, less.reason)
    draft.measurements.append(Measurement("oom_replans", 1))
    changed = {"plan_key": key, "replans": run.replans + 1, "finished_at": None}
    draft.set(plan=less, job=None, run=run.model_copy(update=changed))
    return None


def kept_plan(draft: Draft) -> Plan | None:
    """The smaller plan, as long as it holds. A new one would be the first again."""
    planned, run = draft.status.plan, draft.status.run
    holds = run is not None and run.replans > 0 and run.plan_key == plan_key(draft.job.spec)
    return planned if holds else None


def _without_gpu(planned: Plan | None, pods: tuple[PodView, ...]) -> str:
    """There is nothing to plan again. Names the knobs that matter."""
    said = next((pod.report.message for pod in pods if pod.report), "") or "no details"
    if planned is None:
        return said
    shape = f"micro batch {planned.micro_batch_size}, checkpointing {planned.checkpointing}"
    return (
        f"Out of memory on {planned.gpu_class} with {shape} ({said}): lower training.maxSequenceLength or "
        "training.microBatchSize, or name a larger resources.gpuClass"
    )
