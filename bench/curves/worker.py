"""A training run of one trainer: `python -m bench.curves.worker ours|reference|float32 MODEL [--seed 0] [--steps 100]`.

MODEL is a shape of bench.models, with random weights, or a folder with real ones. All runs see the same rows in the
same order; the seed is that of the adapter's first values. float32 is the reference recipe with every number in 32 bit
but the frozen weights: what the others would compute if nothing were rounded. The result is a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from bench.curves.text import rows
from bench.curves.verdict import VARIANTS
from bench.inputs import tokenizer, training_data
from bench.jobs import plan_of, spec_of
from bench.models import SHAPES, build
from bench.train.clock import StepClock
from qlora_trainer import training
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter, load_quantized
from qlorajob.spec import QLoRAJobSpec

ORDER = 0
"""Seed of the rows' order."""


@dataclass(frozen=True, slots=True)
class Run:
    """What all runs of a comparison have in common."""

    model: str
    steps: int
    rows: int
    length: int
    learning_rate: float
    rank: int = 16

    @property
    def folder(self) -> Path | None:
        """Of the real weights."""
        return None if self.model in SHAPES else Path(self.model)

    def data(self) -> list[dict[str, Any]]:
        """Its rows."""
        return rows(self.rows * self.steps, self.length, self.folder)

    def spec(self) -> QLoRAJobSpec:
        """As a manifest says it. One row a sequence and no dropout: in those the trainers differ."""
        return spec_of(
            {
                "model": {"uri": "hf://bench/random"},
                "dataset": {"uri": "hf://bench/random"},
                "lora": {"rank": self.rank, "alpha": 2 * self.rank, "dropout": 0.0, "targetModules": "all-linear"},
                "training": {
                    "maxSteps": self.steps, "globalBatchSize": self.rows, "maxSequenceLength": self.length,
                    "packing": False, "learningRate": self.learning_rate, "loggingSteps": 1, "saveSteps": 0,
                    "seed": ORDER,
                },
                "output": {"uri": "s3://bench/random"},
            }
        )  # fmt: skip


@dataclass(slots=True)
class Seen:
    """A collator that notes what went through it."""

    collate: Callable[[Any], dict[str, Any]]
    sums: list[int] = field(default_factory=list)

    def __call__(self, examples: Any) -> dict[str, Any]:
        """One batch."""
        batch = self.collate(examples)
        self.sums.append(int(batch["input_ids"].sum()))
        return batch


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    run = Run(options.model, options.steps, options.rows, options.length, options.learning_rate)
    clock = StepClock(1)
    trainers: dict[str, Callable[..., list[int]]] = {
        "ours": _ours, "reference": _reference, "float32": partial(_reference, exact=True),
    }  # fmt: skip
    order = trainers[options.variant](run, options.seed, clock)
    result = {
        "variant": options.variant,
        "seed": options.seed,
        "losses": clock.losses[: run.steps],
        "order": order,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    print(json.dumps(result), flush=True)


def _ours(run: Run, seed: int, clock: StepClock) -> list[int]:
    spec = run.spec()
    plan = plan_of(spec, rows=run.rows, gpus=int(torch.cuda.is_available()), checkpointing="full")
    hardware = Hardware.choose(spec, plan)
    model = _base(run, hardware, spec)
    training.seed_everything(seed)
    trainer = training.make_trainer(
        spec, plan, hardware, model=add_adapter(model, spec.lora), tokenizer=tokenizer(),
        data=training_data(run.data()), total_steps=run.steps, folder=Path(tempfile.mkdtemp()), callbacks=[clock],
    )  # fmt: skip
    seen = trainer.data_collator = Seen(trainer.data_collator)
    training.train(trainer, ORDER, None)
    return seen.sums


def _base(run: Run, hardware: Hardware, spec: QLoRAJobSpec) -> Any:
    torch.manual_seed(0)  # of random weights
    if run.folder is None:
        return build(SHAPES[run.model], device=hardware.device, dtype=hardware.compute_dtype)
    from bench.jobs import settings_of

    return load_quantized(run.folder, settings_of(spec, Path(tempfile.mkdtemp())), hardware)


def _reference(run: Run, seed: int, clock: StepClock, *, exact: bool = False) -> list[int]:
    """The recipe of the QLoRA write-ups: prepare_model_for_kbit_training, PEFT, transformers' Trainer."""
    on_gpu = torch.cuda.is_available()
    base = plain_base(run, torch.bfloat16 if on_gpu else torch.float32)
    if exact:
        compute_in(torch.float32, base)
    model = prepare_model_for_kbit_training(  # which has all that isn't in 4 bit in float32
        base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    spec = run.spec()
    training.seed_everything(seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=run.rank, lora_alpha=2 * run.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=run.steps,
        per_device_train_batch_size=run.rows,
        learning_rate=run.learning_rate,
        warmup_steps=training.warmup_steps(spec, run.steps),
        lr_scheduler_type=spec.training.scheduler,
        weight_decay=spec.training.weight_decay,
        optim=spec.training.optimizer if on_gpu else "adamw_torch",
        max_grad_norm=spec.training.max_grad_norm,
        bf16=on_gpu and not exact,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=ORDER,
        data_seed=ORDER,
    )
    seen = Seen(_collate)
    trainer = Trainer(model=model, args=arguments, train_dataset=run.data(), data_collator=seen, callbacks=[clock])
    trainer.train()
    return seen.sums


def plain_base(run: Run, dtype: torch.dtype) -> Any:
    """The quantized model as the write-ups load it, what isn't quantized in `dtype`."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    if run.folder is None:
        return build(SHAPES[run.model], device="cuda" if on_gpu else "cpu", dtype=dtype)
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        run.folder, quantization_config=bits, dtype=dtype, device_map={"": 0 if on_gpu else "cpu"}
    )
    model.config.use_cache = False
    return model


def compute_in(dtype: torch.dtype, model: Any) -> None:
    """Have the 4-bit layers multiply in this type, with the weights that they have."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows are all of one length."""
    return {key: torch.stack([torch.as_tensor(row[key]).long() for row in examples]) for key in ("input_ids", "labels")}


if __name__ == "__main__":
    main()
