"""Jobs for measurements: a spec, a plan, and the trainer's settings around them. No cluster, no storage but folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_trainer.settings import Settings
from qlorajob.identity import prepare_key
from qlorajob.plan import Plan, Requests
from qlorajob.run import RunConfig
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


def settings_of(spec: QLoRAJobSpec, folder: Path, *, plan: Plan | None = None, prepared: Prepared | None = None) -> Any:
    """What the trainer is told, with `folder` for its scratch files."""
    config = RunConfig(namespace="", name="bench", key=prepare_key(spec), spec=spec, plan=plan, prepared=prepared)
    return Settings(config=config, metrics_port=0, mount_root=folder / "mounts", work_dir=folder / "work")
