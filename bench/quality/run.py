"""One run: the same rows in the same order, from the same adapter, into a base in 4 bit or in 16 bit."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from bench.jobs import plan_of, settings_of, spec_of
from qlora_trainer import model as models
from qlora_trainer import training
from qlora_trainer.data import load_data
from qlora_trainer.hardware import Hardware
from qlora_trainer.settings import Settings
from qlora_trainer.tokenizer import load_tokenizer

Kind = Literal["qlora", "lora"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs have in common."""

    model: str
    """Folder."""
    data: str
    """JSON Lines of instruction and output."""
    steps: int = 200
    rows: int = 16
    """Sequences that make a step."""
    length: int = 128
    """Tokens of a sequence; short rows are packed into it."""
    rank: int = 16
    learning_rate: float = 1e-3
    held_out: float = 0.05
    """Share of the rows that are validated on."""
    looks: int = 8
    """Validations on the way, the last one included."""

    def spec(self, seed: int, *, on_gpu: bool) -> Any:
        """The manifest's spec."""
        return spec_of(
            {
                "model": {"uri": f"file://{self.model}"},
                "dataset": {
                    "uri": f"file://{self.data}",
                    "format": "instruction",
                    "template": "Question: {{ instruction }}\nAnswer:\n{{ output }}",
                    "validation": {"fraction": self.held_out},
                },
                "lora": {"rank": self.rank, "alpha": 2 * self.rank, "dropout": 0.0},
                "training": {
                    "maxSteps": self.steps,
                    "globalBatchSize": self.rows,
                    "maxSequenceLength": self.length,
                    "learningRate": self.learning_rate,
                    "loggingSteps": 1,
                    "saveSteps": 0,
                    "seed": seed,
                },
                "resources": {} if on_gpu else {"gpuClass": "cpu"},
                "output": {"uri": "file:///nowhere"},
            }
        )

    def common(self) -> dict[str, Any]:
        """What a result is only comparable under: everything but where the files lie."""
        found = asdict(self)
        return {**found, "model": Path(self.model).name, "data": Path(self.data).name}


class Curve(TrainerCallback):  # type: ignore[misc]
    """Training loss of each step, and validation loss at evenly spaced ones."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.trainer: Any = None
        self.training: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def look(self, step: int) -> None:
        """Validate."""
        loss = self.trainer.validation_loss()
        self.validation.append((step, round(loss, 5)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.training.append(float(logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Validate when it is time."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.look(state.global_step)


def run(kind: Kind, seed: int, setting: Setting) -> dict[str, Any]:
    """Train, and return the curves. The trainer's own functions, on the GPU where there is one."""
    on_gpu = torch.cuda.is_available()
    began = time.monotonic()
    spec = setting.spec(seed, on_gpu=on_gpu)
    plan = plan_of(spec, rows=setting.rows, gpus=int(on_gpu))
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(spec, Path(scratch), plan=plan)
        hardware = Hardware.choose(spec, plan)
        tokenizer = load_tokenizer(Path(setting.model), settings)
        data = load_data(settings, tokenizer)
        assert data.validation is not None  # noqa: S101 - the spec holds rows out
        model = _base(kind, Path(setting.model), settings, hardware)
        training.seed_everything(seed)  # both kinds begin with the same adapter
        curve = Curve(max(1, setting.steps // setting.looks))
        trainer = curve.trainer = training.make_trainer(
            spec,
            plan,
            hardware,
            model=models.add_adapter(model, spec.lora),
            tokenizer=tokenizer,
            data=data,
            total_steps=setting.steps,
            folder=settings.folder("checkpoints"),
            callbacks=[curve],
        )
        curve.look(0)
        training.train(trainer, seed, None)
        held_out = [data.validation.documents[index] for index in range(len(data.validation.documents))]
    return {
        "kind": kind,
        "seed": seed,
        "setting": setting.common(),
        "training": curve.training,
        "validation": curve.validation,
        "rows": [len(data.train.documents), len(held_out)],
        "validationTokens": sum(int(np.sum(each.labels >= 0)) for each in held_out),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "baseType": "nf4" if kind == "qlora" else str(hardware.compute_dtype).removeprefix("torch."),
        "path": "fast" if trainer.fast is not None else "plain",
        "seconds": round(time.monotonic() - began, 1),
    }


def _base(kind: Kind, folder: Path, settings: Settings, hardware: Hardware) -> Any:
    """The frozen model. In 16 bit it computes as the 4-bit one does: on a CPU, bfloat16's values in float32."""
    if kind == "qlora":
        return models.load_quantized(folder, settings, hardware)
    model = models.load_16bit(folder, settings, hardware.compute_dtype)
    model.config.use_cache = False
    return model.to(hardware.device)
