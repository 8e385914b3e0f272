"""`qlora run`: prepare, plan, train and merge as local processes: the operator's planner, the trainer's code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from pydantic import ValidationError

from qlora_cli.display import ProgressDisplay, describe
from qlora_cli.manifests import ManifestError, load_manifest
from qlora_operator.config import OperatorConfig
from qlora_vram.gpus import CPU, GpuClass
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlora_vram.recognition import product_label, recognize
from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import prepare_key
from qlorajob.names import ENV_METRICS_PORT, ENV_REPORT_PATH, ENV_RUN_CONFIG, ENV_WORK_DIR
from qlorajob.plan import Plan
from qlorajob.resource import QLoRAJob
from qlorajob.run import RunConfig, RunReport, Step
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Artifacts, Prepared, Progress

PHASES: dict[Step, str] = {"prepare": "Preparing", "train": "Training", "merge": "Merging"}
POLL_SECONDS = 1.0
LOG_TAIL_LINES = 15
CLUSTER_ONLY_SCHEMES = ("pvc://", "configmap://")


class StepFailed(Exception):  # noqa: N818 - it says what happened
    """A step ended without success; the message says why and where its log is."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_manifest(path: Path, *, work_dir: Path, allow_remote_code: bool = False) -> Artifacts:
    """Run the manifest to its end and return what it left behind.

    A finished run with the same id is found in the output and not trained again.

    Raises:
        ManifestError: the manifest is wrong or needs a cluster.
        StepFailed: a step failed; the exit code is the trainer's.
    """
    # `kill` and a CI system's time-out mean what Ctrl-C means: save a checkpoint, then stop.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = load_manifest(path)
    _refuse_cluster_only(job.spec)
    steps = LocalSteps(job, work_dir / job.metadata.name, allow_remote_code=allow_remote_code)
    with ProgressDisplay() as display:
        report = steps.run("prepare", display)
        if report.prepared is None:
            raise StepFailed("prepare ended without a result", int(ExitCode.TRANSIENT))
        prepared = report.prepared
        artifacts = prepared.artifacts or Artifacts()
        promoted = prepared.promoted
        display.say(f"Run {prepared.run_id}: {prepared.train_rows} rows, {prepared.total_steps} steps")
        if artifacts.adapter is None:
            plan_ = plan_locally(job.spec, prepared)
            display.say(plan_.reason)
            report = steps.run("train", display, prepared=prepared, plan=plan_)
            artifacts, promoted = report.artifacts or artifacts, report.promoted
        if job.spec.merge.enabled and artifacts.merged is None and promoted is not False:
            report = steps.run("merge", display, prepared=prepared)
            artifacts = report.artifacts or artifacts
        _say_results(display, artifacts, report.progress)
    return artifacts


def _refuse_cluster_only(spec: QLoRAJobSpec) -> None:
    validation = spec.dataset.validation
    uris = {
        "spec.model.uri": spec.model.uri,
        "spec.dataset.uri": spec.dataset.uri,
        "spec.dataset.validation.uri": (validation.uri if validation else None) or "",
    }
    for field, uri in uris.items():
        if uri.startswith(CLUSTER_ONLY_SCHEMES):
            raise ManifestError(f"{field}: {uri} exists on a cluster only; for `qlora run` use file:///path")


def plan_locally(spec: QLoRAJobSpec, prepared: Prepared) -> Plan:
    """The operator's plan for this machine's first GPU, or for its CPU when there is none.

    Raises:
        StepFailed: the model doesn't fit.
    """
    gpu = None if spec.resources.gpu_class == CPU else local_gpu()
    resources = spec.resources.model_copy(update={"gpu_class": gpu.name if gpu else CPU})
    fitted = spec.model_copy(update={"resources": resources})
    outcome = plan(fitted, prepared.facts, [gpu] if gpu else (), OperatorConfig())
    if isinstance(outcome, DoesNotFit):
        raise StepFailed(f"{outcome.reason}: spec.{outcome.field}: {outcome.message}", int(ExitCode.INVALID))
    return outcome


def local_gpu() -> GpuClass | None:
    """This machine's first GPU as the driver describes it, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None
    name, memory, capability = (part.strip() for part in answer.stdout.strip().split(","))
    return recognize(product_label(name), int(memory), float(capability))


class LocalSteps:
    """Runs the trainer's steps for one job, each in its own process with its own log."""

    def __init__(self, job: QLoRAJob, directory: Path, *, allow_remote_code: bool) -> None:
        self._job = job
        self._directory = directory.absolute()
        self._allow_remote_code = allow_remote_code

    def run(
        self, step: Step, display: ProgressDisplay, *, prepared: Prepared | None = None, plan: Plan | None = None
    ) -> RunReport:
        """Run one step and show its progress. Ctrl-C lets it save a checkpoint first.

        Raises:
            StepFailed: it ended with another exit code than 0.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        report_path, log_path = self._directory / f"{step}-report.json", self._directory / f"{step}.log"
        report_path.unlink(missing_ok=True)
        port = _free_port()
        environment = os.environ | {
            ENV_RUN_CONFIG: self._config(prepared, plan).to_json(),
            ENV_REPORT_PATH: str(report_path),
            ENV_METRICS_PORT: str(port),
            ENV_WORK_DIR: str(self._directory),
        }
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "qlora_trainer", step]
            # A group of its own, so that the terminal's Ctrl-C reaches this process alone and is passed on once.
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            exit_code = _follow(process, step, port, display)
        return _result(step, exit_code, report_path, log_path)

    def _config(self, prepared: Prepared | None, plan: Plan | None) -> RunConfig:
        return RunConfig(
            namespace="",
            name=self._job.metadata.name,
            allow_remote_code=self._allow_remote_code,
            key=prepare_key(self._job.spec),
            spec=self._job.spec,
            prepared=prepared,
            plan=plan,
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _follow(process: subprocess.Popen[bytes], step: Step, port: int, display: ProgressDisplay) -> int:
    """Show progress until the process has ended; pass an interrupt on as SIGTERM and keep waiting."""
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            display.update(PHASES[step], _progress(port))
        except KeyboardInterrupt:
            display.say("Stopping after a checkpoint …")
            process.send_signal(signal.SIGTERM)


def _progress(port: int) -> Progress | None:
    """What the step says of itself, once it listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=POLL_SECONDS) as answer:
            return Progress.model_validate_json(answer.read())
    except (OSError, ValidationError):
        return None


def _result(step: Step, exit_code: int, report_path: Path, log_path: Path) -> RunReport:
    try:
        report = RunReport.model_validate_json(report_path.read_bytes())
    except (OSError, ValidationError, json.JSONDecodeError):
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise StepFailed(f"{step} ended with exit code {exit_code} and no report:\n{tail}", exit_code or 1) from None
    if exit_code != ExitCode.DONE:
        where = f"spec.{report.field}: " if report.field else ""
        again = "; run it again to resume" if report.reason == Reason.INTERRUPTED else ""
        raise StepFailed(f"{step}: {report.reason}: {where}{report.message}{again}\n(log: {log_path})", exit_code)
    return report


def _say_results(display: ProgressDisplay, artifacts: Artifacts, progress: Progress | None) -> None:
    if progress and (summary := describe(progress.model_copy(update={"eta_seconds": None}))):
        display.say(summary)
    for name, artifact in artifacts:
        if artifact is not None:
            display.say(f"{name:<8} {artifact.uri}")
