"""QLoRAJob → batch/v1 Jobs, as plain dicts. Pure; tests/golden holds what comes out."""

from __future__ import annotations

from typing import Final

from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Slot
from qlora_operator.grace import grace_seconds
from qlora_operator.placement import GpuRequest, Manifest, claim_spec
from qlora_operator.pods import CONTAINER, pod_spec
from qlora_vram.requests import merge_requests
from qlorajob import names
from qlorajob.errors import ExitCode
from qlorajob.identity import digest, merge_key, prepare_key
from qlorajob.plan import Plan, Requests
from qlorajob.resource import QLoRAJob
from qlorajob.run import RunConfig, Step
from qlorajob.status import Prepared, Progress

KUEUE_QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
NAME_PREFIX_LENGTH: Final = 40


def child_name(job: QLoRAJob, step: Step, identity: str, number: int) -> str:
    """The name of the `number`th Job of a step for these inputs (`identity`).

    Deterministic, so that creating a Job twice is one Job; different for another uid, so that a re-created QLoRAJob
    never takes its predecessor's Job for its own.
    """
    return f"{_prefix(job)}-{step}-{digest([job.metadata.uid, step, identity, number])[:8]}"


def _prefix(job: QLoRAJob) -> str:
    return job.metadata.name[:NAME_PREFIX_LENGTH].replace(".", "-").rstrip("-")


def prepare_job(job: QLoRAJob, number: int, config: OperatorConfig) -> Manifest:
    """The Job that looks at model, data and output. CPU only."""
    key = prepare_key(job.spec)
    resources = config.prepare
    requests = Requests(cpu=resources.cpu, memory=resources.memory, ephemeral_storage=resources.ephemeral_storage)
    return _job(job, "prepare", key, number, _run_config(job, config), requests, config)


def train_job(
    job: QLoRAJob,
    prepared: Prepared,
    plan: Plan,
    number: int,
    config: OperatorConfig,
    slot: Slot | None,
    progress: Progress | None = None,
) -> Manifest:
    """The Job that trains, in `slot` where the plan has GPUs. The only one that Kueue admits.

    `progress` is the run's so far: how long its checkpoints take is how long a pod may take to stop.
    """
    run = _run_config(job, config, prepared, plan)
    run = run.model_copy(
        update={"grace_seconds": grace_seconds(config.termination_grace_period_seconds, plan, progress)}
    )
    template = claim_template(job, slot)
    gpus = GpuRequest(slot, template["metadata"]["name"] if template else "") if slot else None
    manifest = _job(job, "train", prepared.run_id, number, run, plan.requests, config, gpus)
    if job.spec.queue_name:
        manifest["metadata"]["labels"][KUEUE_QUEUE_LABEL] = job.spec.queue_name
        manifest["spec"]["suspend"] = True
    if job.spec.active_deadline_seconds is not None:
        manifest["spec"]["activeDeadlineSeconds"] = job.spec.active_deadline_seconds
    return manifest


def claim_template(job: QLoRAJob, slot: Slot | None) -> Manifest | None:
    """The ResourceClaimTemplate that train_job's pods refer to; None where they ask for an extended resource.

    One for each kind of claim that the QLoRAJob ever needs, and owned by it, so that it may be created any number of
    times, and outlives the Job whose pods come and go.
    """
    if slot is None or slot.gpu.device_class is None:
        return None
    spec = claim_spec(slot)
    labels = _labels(job, "train")
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": _owned(job, f"{_prefix(job)}-gpus-{digest([job.metadata.uid, spec])[:8]}", labels),
        "spec": {"metadata": {"labels": labels}, "spec": spec},
    }


def merge_job(job: QLoRAJob, prepared: Prepared, number: int, config: OperatorConfig) -> Manifest:
    """The Job that merges the adapter into the 16-bit base. CPU only."""
    run = _run_config(job, config, prepared)
    requests = merge_requests(job.spec, prepared.facts, config)
    return _job(job, "merge", prepared.run_id + merge_key(job.spec), number, run, requests, config)


def _run_config(
    job: QLoRAJob, config: OperatorConfig, prepared: Prepared | None = None, plan: Plan | None = None
) -> RunConfig:
    return RunConfig(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        image=config.trainer_image,
        allow_remote_code=config.allow_remote_code,
        key=prepare_key(job.spec),
        spec=job.spec,
        prepared=prepared,
        plan=plan,
        grace_seconds=config.termination_grace_period_seconds,
    )


def _job(
    job: QLoRAJob,
    step: Step,
    identity: str,
    number: int,
    run: RunConfig,
    requests: Requests,
    config: OperatorConfig,
    gpus: GpuRequest | None = None,
) -> Manifest:
    labels = _labels(job, step) | {names.LABEL_ATTEMPT: str(number)}
    if run.prepared:
        labels[names.LABEL_RUN] = run.prepared.run_id
    template_metadata: Manifest = {"labels": dict(labels)}
    if gpus:
        template_metadata["annotations"] = {names.ANNOTATION_GPUS: str(gpus.slot.count)}
    spec: Manifest = {
        "backoffLimit": job.spec.backoff_limit,
        "podFailurePolicy": _failure_policy(),
        "template": {"metadata": template_metadata, "spec": pod_spec(step, run, requests, config, gpus)},
    }
    if job.spec.ttl_seconds_after_finished is not None:
        spec["ttlSecondsAfterFinished"] = max(job.spec.ttl_seconds_after_finished, config.minimum_ttl_seconds)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _owned(job, child_name(job, step, identity, number), labels),
        "spec": spec,
    }


def _labels(job: QLoRAJob, step: Step) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "qlora-trainer",
        "app.kubernetes.io/component": step,
        "app.kubernetes.io/part-of": names.PART_OF,
        "app.kubernetes.io/managed-by": names.PART_OF,
        names.LABEL_JOB: job.metadata.name,
        names.LABEL_STEP: step,
    }


def _owned(job: QLoRAJob, name: str, labels: dict[str, str]) -> Manifest:
    """Metadata of a child: garbage collection ends it with the QLoRAJob."""
    owner = {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": job.metadata.namespace, "labels": labels, "ownerReferences": [owner]}


def _failure_policy() -> Manifest:
    """What happened to the pod from outside never counts; what can't get better ends at once; the rest is retried."""

    def on_codes(action: str, *codes: ExitCode) -> Manifest:
        values = [int(code) for code in codes]
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}

    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            on_codes("Ignore", ExitCode.INTERRUPTED),
            on_codes("FailJob", ExitCode.INVALID, ExitCode.OUT_OF_MEMORY),
        ]
    }
