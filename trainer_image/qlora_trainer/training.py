"""TRL's SFTTrainer, set up from the manifest and the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from qlora_trainer.batches import TOKEN_COUNT, Collator, as_dataset
from qlora_trainer.data import TrainingData
from qlora_trainer.evaluation import mean_loss
from qlora_trainer.fast.checkpointing import checkpoint_layers
from qlora_trainer.hardware import Hardware
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that counts tokens and evaluates token by token."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tokens_seen = 0
        # TRL rounds the adapter to bfloat16. Its updates are smaller than bfloat16 resolves, and fp16's gradient
        # scaler refuses bfloat16 gradients: keep it in float32.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """TRL's fused loss, which keeps the logits out of memory; its kernels need a GPU, so transformers' on CPU."""
        self.tokens_seen += int(inputs.pop(TOKEN_COUNT).sum())
        inputs["use_cache"] = False  # with a cache, transformers doesn't look for packed documents
        if self.args.use_cpu:
            return transformers.Trainer.compute_loss(self, model, inputs, *args, **options)
        return super().compute_loss(model, inputs, *args, **options)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The validation loss, for the callbacks. transformers' own is a mean of batch means."""
        metrics = {"eval_loss": mean_loss(self.model, self.get_eval_dataloader())}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: report.json says more, and a template from the package would be in every checkpoint."""


def make_trainer(
    spec: QLoRAJobSpec,
    plan: Plan,
    hardware: Hardware,
    *,
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    total_steps: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The trainer for a run. The data come tokenised and packed, so TRL's own preparation is skipped."""
    trainer = Trainer(
        model=model,
        args=_arguments(spec, plan, hardware, total_steps, folder, evaluates=_evaluates_while_training(spec, data)),
        train_dataset=as_dataset(data.train),
        eval_dataset=as_dataset(data.validation) if data.validation else None,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id, packed=spec.training.packing),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    hardware.degrade(checkpoint_layers(model, plan))
    return trainer


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    set_seed(seed)


def train(trainer: Trainer, seed: int, resume_from: Path | None) -> None:
    """Train to the end, or until a callback stops it. The random state doesn't depend on what ran before."""
    set_seed(seed)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)


def _arguments(
    spec: QLoRAJobSpec, plan: Plan, hardware: Hardware, total_steps: int, folder: Path, *, evaluates: bool
) -> SFTConfig:
    training = spec.training
    return SFTConfig(
        output_dir=str(folder),
        # How much
        max_steps=total_steps,
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        # How
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=warmup_steps(spec, total_steps),
        optim=hardware.optimizer,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        # With what
        use_cpu=not hardware.on_gpu,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        gradient_checkpointing=False,  # checkpoint_layers sets up what is planned
        dataloader_pin_memory=hardware.on_gpu,
        # What is said and kept
        logging_steps=training.logging_steps,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.save_steps if evaluates else None,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or total_steps,
        save_total_limit=1,  # on local disk; CheckpointStore keeps saveTotalLimit in S3
        # The data are ready
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def warmup_steps(spec: QLoRAJobSpec, total_steps: int) -> int:
    """Steps of warm-up: warmupSteps where it is set, else the share that warmupRatio says."""
    if spec.training.warmup_steps is not None:
        return spec.training.warmup_steps
    return math.ceil(spec.training.warmup_ratio * total_steps)


def _evaluates_while_training(spec: QLoRAJobSpec, data: TrainingData) -> bool:
    """Whether each checkpoint comes with a validation loss: only where that costs less than the training between two.

    A forward pass is a third of a training step, so a validation set as large as the interval adds a third.
    """
    if data.validation is None or not spec.training.save_steps:
        return False
    return len(data.validation.sequences) <= spec.training.save_steps * spec.training.global_batch_size
