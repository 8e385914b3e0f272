"""Runs the trainer's commands inside the test process, as `__main__` would, but for signals and log handlers."""

from __future__ import annotations

import importlib
import json
import shutil
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from qlora_trainer.context import Context, Outcome
from qlora_trainer.settings import Settings
from qlora_trainer.signals import StopSignal
from qlorajob import names
from qlorajob.identity import prepare_key
from qlorajob.manifest import ArtifactManifest, ManifestFile, Provenance
from qlorajob.plan import Plan, Requests
from qlorajob.run import RunConfig
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Artifacts, Prepared

TEMPLATE = "{{ instruction }} {{ input }}= {{ output }}"
"""Short, so that rows of the tiny tokenizer aren't cut."""


NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_manifest(
    run_id: str = "run1", *, files: tuple[ManifestFile, ...] = (), age: int = 0, promoted: bool | None = None
) -> ArtifactManifest:
    """A manifest of a run that ended so many hours ago."""
    return ArtifactManifest(
        run_id=run_id,
        created_at=NOW - timedelta(hours=age),
        files=files,
        provenance=Provenance(
            model_uri="", model_revision="", dataset_uri="", dataset_digest="", image="", versions={}, seed=1, spec={}
        ),
        artifacts=Artifacts(),
        promoted=promoted,
    )


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with nested changes; None removes a field."""
    result = deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def spoil(model: Path, folder: Path, kept: int | None, without: str) -> None:
    """Copy a model whose weights are cut off after so many bytes, or lack a tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != without}, weights)
    weights.write_bytes(weights.read_bytes()[:kept])


SPOILT = [
    (-100, "", "model.safetensors is cut off"),
    (4, "", "model.safetensors is cut off"),
    (0, "", "model.safetensors is cut off"),
    (None, "model.layers.1.mlp.up_proj.weight", "lacks weights: there is no model.layers.1.mlp.up_proj.weight"),
]
"""How, and what is said of it."""


class Job:
    """A manifest's spec that tests change, and the commands that run it."""

    def __init__(self, folder: Path, model: Path, dataset: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.remote_code_allowed = False
        self.spec: dict[str, Any] = {
            "model": {"uri": f"file://{model}"},
            "dataset": {"uri": f"file://{dataset}", "template": TEMPLATE, "validation": {"fraction": 0.1}},
            "lora": {"rank": 4, "alpha": 8},
            "training": {
                "maxSteps": 4,
                "globalBatchSize": 2,
                "maxSequenceLength": 64,
                "learningRate": 1e-2,
                "loggingSteps": 1,
                "saveSteps": 0,
            },
            "resources": {"gpuClass": "cpu"},
            "output": {"uri": f"file://{self.output}"},
        }

    def change(self, **changes: Any) -> Job:
        """Change fields of the spec."""
        self.spec = merged(self.spec, changes)
        return self

    def config(self, prepared: Prepared | None = None, micro_batch: int = 1, **plan: Any) -> RunConfig:
        """The run config, with a plan for the CPU."""
        spec = QLoRAJobSpec.model_validate(self.spec, context={"local": True})
        return RunConfig(
            namespace="team",
            name="codes",
            key=prepare_key(spec),
            spec=spec,
            prepared=prepared,
            allow_remote_code=self.remote_code_allowed,
            plan=Plan(
                gpu_class="cpu",
                gpus=0,
                predicted_peak_bytes=1,
                micro_batch_size=micro_batch,
                gradient_accumulation=spec.training.global_batch_size // micro_batch,
                checkpointing=plan.pop("checkpointing", "none"),
                requests=Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"),
                reason="a test",
            ),
        )

    def environment(self, config: RunConfig) -> dict[str, str]:
        """What the container gets."""
        return {
            names.ENV_RUN_CONFIG: config.to_json(),
            names.ENV_REPORT_PATH: str(self.folder / "report.json"),
            names.ENV_METRICS_PORT: "0",
            names.ENV_MOUNT_ROOT: str(self.folder / "mounts"),
            names.ENV_WORK_DIR: str(self.folder / "work"),
        }

    def settings(self, config: RunConfig | None = None) -> Settings:
        """The parsed environment."""
        return Settings.from_env(self.environment(config or self.config()))

    def run(self, step: str, config: RunConfig, stop: StopSignal | None = None) -> Outcome:
        """Run one command in this process. Raises StepError as the command does."""
        context = Context(self.settings(config), stop or StopSignal())
        importlib.import_module(f"qlora_trainer.{step}").run(context)
        return context.outcome

    def prepare(self) -> Prepared:
        """Prepare, and return what was found."""
        prepared = self.run("prepare", self.config()).prepared
        assert prepared is not None
        return prepared

    def train(self, prepared: Prepared | None = None, **options: Any) -> Outcome:
        """Prepare and train."""
        return self.run("train", self.config(prepared or self.prepare(), **options))

    def result(self, prepared: Prepared, name: str) -> Any:
        """A JSON file below the run's prefix."""
        return json.loads((self.output / prepared.run_id / name).read_text(encoding="utf-8"))
