"""Reading other people's error messages: why a pod doesn't start, why a Job failed, and which field to blame. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from qlora_operator.observed import JobView, PodView
from qlora_operator.pods import claims, config_maps, secrets
from qlorajob.errors import ExitCode, Reason
from qlorajob.run import Step
from qlorajob.spec import QLoRAJobSpec

IMAGE_REASONS: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
)
CONTAINER_REASONS: Final = frozenset({"CreateContainerError", "RunContainerError"})
"""The runtime's: a device that can't be injected, a mount that it refuses. The kubelet tries again for ever."""
PASSING: Final = timedelta(seconds=20)
"""The kubelet tries again after 0.5, 1, 2 … s. What it says in the beginning often passes: it may know a pod before it
is allowed to read the pod's volumes."""
MISSING_SECRET: Final = re.compile(r'secret "([^"]+)" not found', re.IGNORECASE)
MISSING_SECRET_KEY: Final = re.compile(r"couldn't find key (\S+) in Secret [^/\s]+/(\S+)")
MISSING_CONFIG_MAP: Final = re.compile(r'configmap "([^"]+)" not found', re.IGNORECASE)
MISSING_CLAIM: Final = re.compile(r'persistentvolumeclaim "([^"]+)" (?:not found|is being deleted)', re.IGNORECASE)
OVERRUN: Final = re.compile(r"Evicted: .*\bexceed(s|ed)\b", re.DOTALL)
"""The kubelet's words for a pod that used more local disk than its own limits, whatever the node has left."""
MORE_DISK: Final[dict[str, str]] = {
    "prepare": "raise the chart's trainer.prepare.ephemeralStorage",
    "train": "raise spec.resources.ephemeralStorage, or set model.cacheClaim",
    "merge": "set model.cacheClaim, so that the download takes no local disk",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason for programs and a sentence for people."""

    reason: str
    message: str


def stuck(spec: QLoRAJobSpec, job: JobView, pod: PodView | None) -> Problem | None:
    """What keeps the Job's pod from starting, when somebody has to do something about it."""
    if pod is None:
        said = job.complaint.message
        return Problem(Reason.POD_CREATION_FAILED, f"Job {job.name}: {said}") if said else None
    if pod.phase != "Pending":
        return None
    heard = [text for text in (pod.waiting.message if pod.waiting else "", pod.complaint.message) if text]
    for text in heard:
        found = _missing(spec, text)
        if found:
            return found
    if pod.waiting and pod.waiting.reason in IMAGE_REASONS:
        return Problem(Reason.IMAGE_UNAVAILABLE, f"the trainer image can't be pulled: {pod.waiting.message}")
    if pod.waiting and pod.waiting.reason == "CreateContainerConfigError":
        return Problem(Reason.INVALID_SPEC, f"the container can't be configured: {pod.waiting.message}")
    if pod.waiting and pod.waiting.reason in CONTAINER_REASONS:
        return Problem(Reason.POD_CREATION_FAILED, f"pod {pod.name} can't start its container: {pod.waiting.message}")
    if pod.complaint.lasting >= PASSING:
        return Problem(Reason.VOLUME_NOT_READY, f"pod {pod.name} can't start: {pod.complaint.message}")
    return None


def _missing(spec: QLoRAJobSpec, text: str) -> Problem | None:
    if match := MISSING_SECRET_KEY.search(text):
        key, name = match.groups()
        return _blame(Reason.SECRET_NOT_FOUND, f"Secret {name} has no key {key}", secrets(spec).get(name))
    lookups = (
        (MISSING_SECRET, Reason.SECRET_NOT_FOUND, "Secret", secrets(spec)),
        (MISSING_CONFIG_MAP, Reason.CONFIG_MAP_NOT_FOUND, "ConfigMap", config_maps(spec)),
        (MISSING_CLAIM, Reason.CLAIM_NOT_FOUND, "PersistentVolumeClaim", claims(spec)),
    )
    for pattern, reason, kind, fields in lookups:
        if match := pattern.search(text):
            return _blame(reason, f"there is no {kind} {match[1]} in this namespace", fields.get(match[1]))
    return None


def _blame(reason: Reason, message: str, field: str | None) -> Problem:
    return Problem(reason, f"spec.{field}: {message}" if field else message)


def overrun(pods: tuple[PodView, ...]) -> Problem | None:
    """That the step needs more local disk than it may use: the next pod would get as far. `pods` come newest first.

    The kubelet asks such a pod to stop. So it may end as one that was interrupted, which is tried again for ever.
    """
    return next((_words(pod) for pod in pods if OVERRUN.match(pod.verdict)), None)


def last_failure(pods: tuple[PodView, ...]) -> Problem | None:
    """How the newest pod that failed ended, in its own words where it left some. `pods` come newest first."""
    for pod in pods:
        if pod.phase != "Failed" and pod.exit_code in (None, 0):
            continue
        return _words(pod)
    return None


def _words(pod: PodView) -> Problem:
    if OVERRUN.match(pod.verdict):
        said = pod.verdict.removeprefix("Evicted: ").strip().rstrip(".")
        return Problem(Reason.DISK_FULL, f"{pod.step} needs more local disk ({said}): {MORE_DISK.get(pod.step, '')}")
    if pod.report:
        return _blame(pod.report.reason, pod.report.message or pod.report.reason, pod.report.field)
    if pod.termination == "OOMKilled":
        return Problem(
            Reason.OUT_OF_MEMORY,
            "spec.resources.memory: the container was killed for using more host memory than its limit",
        )
    if pod.verdict:
        return Problem(Reason.BACKOFF_LIMIT_EXCEEDED, f"pod {pod.name} was ended by the cluster: {pod.verdict.strip()}")
    lines = [line for line in pod.last_words.splitlines() if line.strip()]
    ending = "without an exit code" if pod.exit_code is None else f"with exit code {pod.exit_code}"
    return Problem(
        Reason.BACKOFF_LIMIT_EXCEEDED, f"pod {pod.name} ended {ending}" + (f": {lines[-1].strip()}" if lines else "")
    )


def job_failure(spec: QLoRAJobSpec, step: Step, job: JobView, pods: tuple[PodView, ...]) -> Problem:
    """Why the step is over. The report's own reason says more than the Job's."""
    if job.failure == "DeadlineExceeded":
        seconds = spec.active_deadline_seconds
        return Problem(
            Reason.DEADLINE_EXCEEDED, f"spec.activeDeadlineSeconds: {step} was still active after {seconds} seconds"
        )
    last = last_failure(pods)
    if last is None:
        return Problem(Reason.BACKOFF_LIMIT_EXCEEDED, f"Job {job.name} failed: {job.message or job.failure}")
    tries = sum(1 for pod in pods if pod.phase == "Failed" and pod.exit_code != ExitCode.INTERRUPTED)
    if job.failure == "BackoffLimitExceeded" and tries > 1:
        return Problem(last.reason, f"{last.message} (gave up after {tries} tries)")
    return last
