"""The trainers that are compared. Each gets a random-weight model, the same rows, and runs some steps under a clock."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from bench.inputs import tokenizer, training_data
from bench.jobs import plan_of
from bench.models import FUSED, SHAPES, Shape, build
from bench.train.cases import Case, corpus
from bench.train.clock import StepClock
from qlora_trainer import training
from qlora_trainer.data import TrainingData
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter
from qlorajob.spec import QLoRAJobSpec


def run(variant: str, case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    """Train `steps` steps; returns what there is to say besides the clock: the useful tokens of a step, and more."""
    return {"ours": _ours, "reference": _reference, "unsloth": _unsloth}[variant](case, steps, clock)


def _ours(case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    spec = _spec(case, steps)
    plan = plan_of(
        spec,
        rows=case.rows,
        gpus=int(torch.cuda.is_available()),
        checkpointing=case.checkpointing,
        checkpointed_layers=case.layers,
        offload_checkpoints=case.offload,
        cache_weights=case.cached,
    )
    hardware = Hardware.choose(spec, plan)
    model = _model(case)
    model = add_adapter(model, spec.lora)
    data = _data(case, steps)
    trainer = training.make_trainer(
        spec,
        plan,
        hardware,
        model=model,
        tokenizer=tokenizer(),
        data=data,
        total_steps=steps,
        folder=Path(tempfile.mkdtemp()),
        callbacks=[clock],
    )
    training.train(trainer, 0, None)
    return {
        "tokens": trainer.tokens_seen / steps,
        "path": "fast" if trainer.fast is not None else "plain",
        "degradations": hardware.degradations,
        "trainer": trainer,
    }


def _spec(case: Case, steps: int) -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(
        {
            "model": {"uri": "hf://bench/random"},
            "dataset": {"uri": "hf://bench/random"},
            "quantization": {"doubleQuant": case.double_quant},
            "lora": {
                "rank": case.rank,
                "alpha": case.rank,
                "dropout": case.dropout,
                "targetModules": SHAPES[case.shape].named(case.targets),
            },
            "training": {
                "maxSteps": steps,
                "globalBatchSize": case.rows,
                "microBatchSize": case.rows,
                "maxSequenceLength": case.length,
                "packing": bool(case.mean_length),
                "optimizer": case.optimizer,
                "loggingSteps": steps,
                "saveSteps": 0,
            },
            "output": {"uri": "s3://bench/random"},
        }
    )


def _model(case: Case, shape: Shape | None = None) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape or SHAPES[case.shape]
    model = build(shape, double_quant=case.double_quant, device=device, max_length=case.length)
    if device == "cuda":
        torch.cuda.empty_cache()  # what building left behind, which loading doesn't
        torch.cuda.reset_peak_memory_stats()
    return model


def _data(case: Case, steps: int) -> TrainingData:
    """Enough rows for all steps; packed where their lengths differ."""
    made = corpus(case, _rows(case, steps), SHAPES[case.shape].vocabulary)
    return training_data(made, capacity=case.length if case.mean_length else None)


def _rows(case: Case, steps: int) -> int:
    """Rows that are enough for all steps, packed where their lengths differ."""
    return case.rows * steps * (case.length // case.mean_length + 1 if case.mean_length else 1)


def _reference(case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    """The recipe of the QLoRA write-ups: prepare_model_for_kbit_training, PEFT, transformers' Trainer."""
    model = _model(case)
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, _lora(case))
    return _transformers(model, case, steps, clock)


def _unsloth(case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    """Unsloth's own loader and patches, with the random model in place of one from disk.

    It has no layers for fused products: on the hub, its Phi-4 is a Llama.
    """
    import unsloth.models.llama  # patches transformers; must come before the model is made
    from unsloth import FastLanguageModel

    shape = SHAPES[case.shape]
    if shape.family in FUSED:
        shape = shape.as_llama

    class Loader:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            return _model(case, shape)

    unsloth.models.llama.AutoModelForCausalLM = Loader
    folder = tempfile.mkdtemp()
    shape.config(case.length).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=case.length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        target_modules=list(case.targets),
        lora_alpha=case.rank,
        lora_dropout=case.dropout,
        bias="none",
        use_gradient_checkpointing=os.environ.get("UNSLOTH_CHECKPOINTING", "unsloth") or False,
        max_seq_length=case.length,
    )
    return (_trl_packed if case.mean_length else _transformers)(model, case, steps, clock)


def _trl_packed(model: Any, case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    """Unsloth's own packing: TRL's trainer, which Unsloth patches, packs the rows and hands on where each ends."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made = corpus(case, _rows(case, steps), SHAPES[case.shape].vocabulary)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(packing=True, max_length=case.length, **_arguments(case, steps)),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in made]),
        processing_class=tokenizer(),
        callbacks=[clock],
    )
    sequences = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    packed = max(sequences) > max(map(len, (row["input_ids"] for row in made))) or len(sequences) < len(made)
    trainer.train()
    return {"tokens": case.rows * sum(sequences) / len(sequences), "packed": packed, "trainer": trainer}


def _lora(case: Case) -> LoraConfig:
    return LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        lora_dropout=case.dropout,
        target_modules=SHAPES[case.shape].named(case.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _transformers(model: Any, case: Case, steps: int, clock: StepClock) -> dict[str, Any]:
    rows = corpus(case, case.rows * steps, SHAPES[case.shape].vocabulary)
    for row in rows:
        row["length"] = len(row["input_ids"])
    arguments = TrainingArguments(
        train_sampling_strategy="group_by_length" if case.mean_length else "random",
        remove_unused_columns=False,
        **_arguments(case, steps),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_collate, callbacks=[clock])
    trainer.train()
    return {"tokens": sum(row["length"] for row in rows) / steps, "trainer": trainer}


def _arguments(case: Case, steps: int) -> dict[str, Any]:
    """What transformers' and TRL's trainers are told alike."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": case.rows,
        "learning_rate": 2e-4,
        "warmup_steps": max(1, steps * 3 // 100),
        "lr_scheduler_type": "cosine",
        "optim": case.optimizer if torch.cuda.is_available() else "adamw_torch",
        "max_grad_norm": 0.3,
        "bf16": torch.cuda.is_available(),
        "logging_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(row["length"] for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        padding = [[value] * (longest - row["length"]) for row in rows]
        return torch.tensor([[*row[key], *more] for row, more in zip(rows, padding, strict=True)], dtype=torch.long)

    mask = torch.tensor([[1] * row["length"] + [0] * (longest - row["length"]) for row in rows])
    return {"input_ids": padded("input_ids", 1), "labels": padded("labels", -100), "attention_mask": mask}
