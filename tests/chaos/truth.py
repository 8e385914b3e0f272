"""What a recorded history proves: that the status never lied, and that nothing was done twice. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from qlora_operator.observed import PodView, job_view, pod_view
from qlorajob.errors import Reason
from tests.chaos.history import Version

CLOCK = 1.0
"""Seconds: Kubernetes' times are whole ones."""


def lies(story: Sequence[Version]) -> list[str]:
    """What was not so, in words. `story` is that of one QLoRAJob's name and its children."""
    return [*_of_status(story), *_of_jobs(story), *_of_pods(story)]


def trainings(story: Sequence[Version]) -> dict[str, int]:
    """Run id → how many pods trained it to its end."""
    done: dict[str, int] = {}
    for version in _last(version for version in story if version.kind == "Pod" and version.step == "train"):
        report = pod_view(version.raw).report
        if report and report.exit_code == 0 and report.reason is not Reason.ALREADY_TRAINED:
            done[version.run] = done.get(version.run, 0) + 1
    return done


def timeline(story: Sequence[Version]) -> str:
    """What changed when, a line each: for people who read why a cell failed."""
    lines, last = [], dict[str, str]()
    for version in story:
        said = _summary(version)
        if last.get(version.uid) != said:
            last[version.uid] = said
            name = version.raw["metadata"]["name"]
            lines.append(f"{version.at - story[0].at:6.1f} s  {version.kind:8}  {name}  {said}")
    return "\n".join(lines)


def _summary(version: Version) -> str:
    true = [c["type"] for c in version.status.get("conditions") or () if c["status"] == "True"]
    if version.kind == "QLoRAJob":
        said = [version.phase, f"step {(version.status.get('progress') or {}).get('step')}"]
    elif version.kind == "Job":
        said = [job_view(version.raw).state, *true]
    else:
        pod = pod_view(version.raw)
        said = [pod.phase, *([f"exit code {pod.exit_code}"] if pod.exit_code is not None else [])]
    return ", ".join([*said, *(["gone"] if version.gone else ["deleting"] if version.deleting else [])])


def pods_of(story: Sequence[Version], step: str) -> list[PodView]:
    """The step's pods, as they were last seen, oldest first."""
    return [pod_view(v.raw) for v in _last(v for v in story if v.kind == "Pod" and v.step == step)]


def _last(versions: Iterable[Version]) -> Iterator[Version]:
    yield from {version.uid: version for version in versions}.values()


def _of_status(story: Sequence[Version]) -> Iterator[str]:
    began = _training_began(story)
    succeeded: set[tuple[str, int]] = set()
    for version in story:
        if version.kind != "QLoRAJob" or version.gone or not version.phase:
            continue
        generation = version.status.get("observedGeneration", -1)
        when = f"{version.phase} at version {version.raw['metadata']['resourceVersion']}"
        if version.true("Complete") and version.true("Failed"):
            yield f"{when}: Complete and Failed at once"
        if version.true("Ready") != (version.phase == "Succeeded"):
            yield f"{when}: Ready is {version.true('Ready')}"
        if version.phase == "Training" and version.at + CLOCK < began:
            yield f"{when}: no training pod had started"
        if version.phase == "Succeeded":
            succeeded.add((version.uid, generation))
            yield from (f"{when}: {missing}" for missing in _missing(version))
        elif (version.uid, generation) in succeeded:
            yield f"{when}: a step back from Succeeded"


def _missing(version: Version) -> Iterator[str]:
    artifacts = version.status.get("artifacts") or {}
    spec, current = version.raw["spec"], version.raw["metadata"]["generation"]
    if "adapter" not in artifacts:
        yield "no adapter"
    if version.published is False:
        yield "no manifest in S3"
    if spec["merge"]["enabled"] and version.status["observedGeneration"] == current and "merged" not in artifacts:
        yield "no merged model"


def _training_began(story: Sequence[Version]) -> float:
    starts = [pod.started_at.timestamp() for pod in pods_of(story, "train") if pod.started_at]
    return min(starts, default=float("inf"))


def _of_jobs(story: Sequence[Version]) -> Iterator[str]:
    def live(version: Version) -> bool:
        job = job_view(version.raw)
        return job.live and not job.deleting

    yield from _at_once(story, "Job", live, "live training Jobs")


def _of_pods(story: Sequence[Version]) -> Iterator[str]:
    yield from _at_once(story, "Pod", lambda version: pod_view(version.raw).phase == "Running", "running training pods")


def _at_once(story: Sequence[Version], kind: str, counts: Callable[[Version], bool], what: str) -> Iterator[str]:
    """Where more than one of a run's objects counted at the same time."""
    now: dict[str, Version] = {}
    for version in story:
        if version.kind != kind or version.step != "train":
            continue
        now.pop(version.uid, None)
        if not version.gone and counts(version):
            now[version.uid] = version
        names = sorted(other.raw["metadata"]["name"] for other in now.values() if other.run == version.run)
        if len(names) > 1:
            yield f"run {version.run}: {len(names)} {what}: {', '.join(names)}"
