"""One cell of the fault matrix: a job brought to a phase and held there, a fault, and what must hold after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from demo.verify import list_keys, verify_run
from qlora_operator.observed import PodView
from qlorajob.manifest import ADAPTER, MANIFEST, ArtifactManifest
from tests.chaos import truth
from tests.chaos.history import History, Json, Version
from tests.chaos.ledger import LEDGER
from tests.e2e.conftest import tiny_manifest
from tests.support.faulty_s3 import FaultyS3, delay
from tests.support.live import Manifest, Namespace, merged

BUCKET = "chaos"
STEPS, SAVE_STEPS = 12, 2
QUEUE = "kueue"
"""Nothing serves it: the test suspends and admits Jobs, as Kueue would."""
PHASES = {"preparing": "Preparing", "queued": "Queued", "training": "Training", "merging": "Merging"}
"""Where a fault can strike → the phase that the status says there."""
MOMENTS = {
    "preparing": r"GET \S+/data/rows\.jsonl",
    # One checkpoint is whole, the second isn't, and training has gone on behind it.
    "training": r"PUT \S+/checkpoints/step-4\.[0-9a-f]+/manifest\.json",
    # The first part of the merged weights is uploaded, or is about to be.
    "merging": r"PUT \S+/merged/\S*partNumber=2",
}
"""Where a fault can strike → the request that is held meanwhile."""
LATER_CHECKPOINTS = r"PUT \S+/checkpoints/step-(6|8|10)\.[0-9a-f]+/manifest\.json"
KUBELET_SECONDS = 3.0
"""From a pod's deletion to its SIGTERM, on a busy node; a third of it."""
CELL_SECONDS = 420.0


@dataclass
class Cell:
    """A job with an S3 endpoint of its own, in front of the real one."""

    namespace: Namespace
    history: History
    s3: Any
    """The real server."""
    storage: FaultyS3
    """What the job's pods see of it."""
    name: str
    spec: Manifest = field(default_factory=dict)
    """What is applied."""
    ended: Json = field(default_factory=dict)
    """The status at the end."""

    # The user

    def apply(self, spec: Manifest | None = None) -> None:
        """Create the job, or change it by `spec`."""
        self.spec = merged(self.spec, spec or {})
        base = {
            "model": {"uri": f"s3://{BUCKET}/model"},
            "dataset": {"uri": f"s3://{BUCKET}/data"},
            "training": {"maxSteps": STEPS, "saveSteps": SAVE_STEPS},
            "output": {"uri": self.output_uri, "endpoint": self.storage.endpoint},
        }
        self.namespace.apply(tiny_manifest(self.namespace, self.name, merged(base, self.spec)))

    def delete(self) -> None:
        """Delete the job; what belongs to it goes in its own time."""
        self.namespace.kubectl("delete", "qlj", self.name, "--wait=false")

    @property
    def output_uri(self) -> str:
        return f"s3://{BUCKET}/{self.namespace.name}/{self.name}"

    @contextmanager
    def at(self, phase: str, spec: Manifest | None = None) -> Iterator[None]:
        """Start the job, bring it to the phase, and hold it there until the block ends."""
        if phase == "queued":
            self.apply(merged({"queueName": QUEUE}, spec or {}))
            self.until_phase("queued")
            yield
            self.admit()
            return
        with self.storage.holding(MOMENTS[phase]) as arrived:
            self.apply(merged({"merge": {"enabled": phase == "merging"}}, spec or {}))
            assert arrived.wait(CELL_SECONDS), f"no {MOMENTS[phase]}: {self.namespace.story(self.name)}"
            self.until_phase(phase)
            yield

    # The queue

    def admit(self) -> None:
        """Let the training Job run, as Kueue does when there is room."""
        name = self.job_of("train").raw["metadata"]["name"]
        self.namespace.kubectl("patch", "job", name, "--type=merge", "-p", '{"spec": {"suspend": false}}')

    # What there is

    @property
    def job(self) -> Version | None:
        """The QLoRAJob as it is now; None between two of its name."""
        there = self.history.now(self.name, "QLoRAJob")
        return next((version for version in there if not version.deleting), None)

    @property
    def status(self) -> Json:
        return self.job.status if self.job else {}

    def job_of(self, step: str) -> Version:
        """The Job that is waited for."""

        def find() -> Version | None:
            jobs = self.history.now(self.name, "Job", step)
            return next((job for job in jobs if job.raw["metadata"]["name"] == self.status.get("job")), None)

        found: Version = self.until(find, f"a {step} Job")
        return found

    def pod_of(self, step: str) -> Version:
        """The step's running pod."""

        def find() -> Version | None:
            pods = self.history.now(self.name, "Pod", step)
            return next((pod for pod in pods if pod.phase == "Running" and not pod.deleting), None)

        found: Version = self.until(find, f"a running {step} pod")
        return found

    def pods(self, step: str) -> list[PodView]:
        """All that the step ever had, as they were last seen, oldest first."""
        return truth.pods_of(self.story(), step)

    def live_pods(self, step: str = "") -> list[Version]:
        """Those that run, or will."""
        live = ("Pending", "Running", "Unknown")
        return [pod for pod in self.history.now(self.name, "Pod", step) if pod.phase in live]

    def story(self) -> list[Version]:
        return self.history.of(self.name)

    # Waiting

    def until(self, check: Any, what: str, seconds: float = CELL_SECONDS) -> Any:
        """The first truthy answer of `check`, asked whenever anything changes."""

        def explain() -> str:
            return f"{what}\n{truth.timeline(self.story())}\n{self.namespace.story(self.name)}"

        return self.history.until(check, seconds, explain)

    def until_phase(self, phase: str) -> None:
        """Wait until the current spec's status says so."""
        told = PHASES[phase]
        self.until(lambda: (job := self._current()) and job.phase == told, f"{self.name} is {told}")

    def until_condition(self, kind: str) -> Json:
        """Wait until the current spec's status has the condition; the status."""
        self.until(lambda: (job := self._current()) and job.true(kind), f"{self.name} is {kind}")
        return self.status

    def until_seen(self, generation: int) -> None:
        """Wait until the operator has looked at this version of the spec."""
        self.until(lambda: self.status.get("observedGeneration") == generation, f"generation {generation} is seen")

    def until_asked_to_go(self, pods: Iterable[Version]) -> None:
        """Wait until these pods are to get SIGTERM, or are gone; the next checkpoints take until it is there."""
        uids = {pod.uid for pod in pods}

        def staying() -> bool:
            return any(pod.uid in uids and not pod.deleting for pod in self.history.now(self.name, "Pod"))

        self.until(lambda: not staying(), "its pods are asked to go")
        self.storage.inject(delay(KUBELET_SECONDS), LATER_CHECKPOINTS, times=3)

    def until_gone(self, uid: str) -> None:
        """Wait until this very QLoRAJob isn't there any more."""
        self.until(lambda: all(v.uid != uid for v in self.history.now(self.name, "QLoRAJob")), "it is deleted")

    def _current(self) -> Version | None:
        job = self.job
        return job if job and job.status.get("observedGeneration") == job.raw["metadata"]["generation"] else None

    # What must hold

    def check(self, *, runs: int = 1, tried: int = 0, config_maps: Sequence[str] = ()) -> Json:
        """Wait for the end, then check everything; the last run's report. `runs` is how many run ids get an adapter,
        `tried` how many more left something behind in S3 when they were replaced. `config_maps` are the test's own."""
        self.ended = self.until_condition("Complete")
        report = verify_run(self.s3, self.output_uri, self.ended["run"]["id"]).report
        self._check_results(runs, tried)
        self._check_repetitions()
        self._check_rest(config_maps)
        assert truth.lies(self.story()) == [], truth.timeline(self.story())
        return report

    def _check_results(self, runs: int, tried: int) -> None:
        """One adapter per run id, and each that of every other cell, however it was interrupted."""
        prefix = f"{self.namespace.name}/{self.name}/"
        found = [key.removeprefix(prefix) for key in list_keys(self.s3, BUCKET, prefix)]
        begun = {key.partition("/")[0] for key in found if "/" in key}
        whole = {run_id for run_id in begun if f"{run_id}/{MANIFEST}" in found}
        LEDGER.lost += max(0, runs - len(whole))
        LEDGER.duplicated += max(0, len(whole) - runs)
        assert len(whole) == runs, f"finished runs in S3: {sorted(whole)}"
        assert len(begun) <= runs + tried, f"runs in S3: {sorted(begun)}"
        for run_id in whole:
            weights = adapter_digest(self.s3, self.output_uri, run_id)
            expected = LEDGER.adapters.setdefault(run_id, weights)
            LEDGER.lost += weights != expected
            assert weights == expected, f"run {run_id}: not the weights that an earlier cell got"

    def _check_repetitions(self) -> None:
        """No run was trained to its end twice."""
        trained = truth.trainings(self.story())
        LEDGER.duplicated += sum(times - 1 for times in trained.values())
        assert [run for run, times in trained.items() if times > 1] == []

    def _check_rest(self, own: Sequence[str]) -> None:
        """Nothing goes on, and when the job is deleted nothing stays."""

        def live() -> list[str]:
            jobs = [j for j in self.history.now(self.name, "Job") if not (j.true("Complete") or j.true("Failed"))]
            pods = [p for p in self.history.now(self.name, "Pod") if p.phase in ("Pending", "Running", "Unknown")]
            return [version.raw["metadata"]["name"] for version in (*jobs, *pods)]

        self.until(lambda: not live(), "nothing of it goes on")
        uploads = self.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        torn = [upload["Key"] for upload in uploads if f"/{self.name}/" in upload["Key"]]
        assert torn == [], f"multipart uploads that never ended: {torn}"
        self.delete()
        kinds = ("QLoRAJob", "Job", "Pod")
        self.until(lambda: not any(self.history.now(self.name, kind) for kind in kinds), "nothing of it is left")
        assert _config_maps(self.namespace) - set(own) == {"kube-root-ca.crt"}


def adapter_digest(s3: Any, output_uri: str, run_id: str) -> str:
    """SHA-256 of a run's adapter weights, as its manifest says it."""
    bucket, _, prefix = output_uri.removeprefix("s3://").partition("/")
    content = s3.get_object(Bucket=bucket, Key=f"{prefix}/{run_id}/{MANIFEST}")["Body"].read()
    files = ArtifactManifest.model_validate_json(content).files
    (weights,) = [file for file in files if file.path == f"{ADAPTER}/adapter_model.safetensors"]
    return weights.sha256


def _config_maps(namespace: Namespace) -> set[str]:
    return {item["metadata"]["name"] for item in namespace.get("configmaps")["items"]}
