"""Jobs for measurements: a spec, a plan, the trainer's settings, and its steps as processes. Storage is folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlora_trainer.settings import Settings
from qlorajob import names
from qlorajob.identity import prepare_key
from qlorajob.plan import Plan, Requests
from qlorajob.run import RunConfig, RunReport, Step
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Prepared


def spec_of(fields: dict[str, Any]) -> QLoRAJobSpec:
    """A spec, with `file://` allowed."""
    return QLoRAJobSpec.model_validate(fields, context={"local": True})


def plan_of(spec: QLoRAJobSpec, *, rows: int, gpus: int = 1, **cut: Any) -> Plan:
    """A plan that wasn't planned: so many rows at once, cut as `cut` says. 0 GPUs: on CPU."""
    return Plan(
        gpu_class="bench" if gpus else "cpu",
        gpus=gpus,
        predicted_peak_bytes=0,
        micro_batch_size=rows,
        gradient_accumulation=spec.training.global_batch_size // rows,
        checkpointing=cut.pop("checkpointing", "none"),
        requests=Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"),
        reason="a measurement",
        **cut,
    )


def settings_of(
    spec: QLoRAJobSpec, folder: Path, *, plan: Plan | None = None, prepared: Prepared | None = None
) -> Settings:
    """What the trainer is told, with `folder` for its scratch files. Code that the manifest trusts may run."""
    config = RunConfig(
        namespace="", name="bench", key=prepare_key(spec), spec=spec, plan=plan, prepared=prepared,
        allow_remote_code=spec.model.trust_remote_code,
    )  # fmt: skip
    return Settings(config=config, metrics_port=0, mount_root=folder / "mounts", work_dir=folder / "work")


@dataclass(frozen=True, slots=True)
class Ran:
    """A step of the trainer that ran in a process of its own."""

    report: RunReport
    began: float
    """When the process was started: seconds since the epoch."""
    log: tuple[dict[str, Any], ...]
    """Lines of its log."""

    def at(self, message: str) -> float:
        """Seconds from the process's start to the first line of the log that begins so."""
        line = next(line for line in self.log if str(line["message"]).startswith(message))
        return datetime.fromisoformat(line["time"]).timestamp() - self.began

    @property
    def laps(self) -> dict[str, float]:
        """Seconds of each part, as the trainer's clock tells them."""
        done = [line for line in self.log if "seconds" in line and line["message"].endswith(" done")]
        return {line["message"].removesuffix(" done"): line["seconds"] for line in done}

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        steps = [line for line in self.log if line["message"].startswith("step ") and "loss" in line]
        return {int(line["message"].split()[1]): float(line["loss"]) for line in steps}


def run_step(
    step: Step,
    spec: QLoRAJobSpec,
    folder: Path,
    *,
    plan: Plan | None = None,
    prepared: Prepared | None = None,
    launcher: Sequence[str] = ("-m", "qlora_trainer"),
    environment: Mapping[str, str] = MappingProxyType({}),
    limit: float = 300,
) -> Ran:
    """Run prepare or train as a pod would, and wait for its end. Raises RuntimeError if it leaves no report."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{step}-report.json"
    report.unlink(missing_ok=True)
    settings = settings_of(spec, folder, plan=plan, prepared=prepared)
    told = {
        names.ENV_RUN_CONFIG: settings.config.to_json(),
        names.ENV_REPORT_PATH: str(report),
        names.ENV_METRICS_PORT: "0",
        names.ENV_MOUNT_ROOT: str(settings.mount_root),
        names.ENV_WORK_DIR: str(settings.work_dir),
    }
    began = time.time()
    ran = subprocess.run(
        [sys.executable, *launcher, step],
        env={**os.environ, **told, **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if not report.exists():
        raise RuntimeError(f"{step} left no report: {(ran.stderr or ran.stdout)[-1500:]}")
    lines = tuple(json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"time"'))
    return Ran(RunReport.model_validate_json(report.read_text(encoding="utf-8")), began, lines)
