"""TRL's SFTTrainer, set up from the manifest and the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from qlora_trainer import unsloth_backend
from qlora_trainer.batches import TOKEN_COUNT, Collator, as_dataset, model_inputs
from qlora_trainer.data import TrainingData
from qlora_trainer.evaluation import mean_loss
from qlora_trainer.fast.checkpointing import checkpoint_layers
from qlora_trainer.fast.optimizer import gpu_memory, keep_small_states_resident, let_optimizers_run_ahead
from qlora_trainer.hardware import Hardware
from qlora_trainer.head import why_not_fused
from qlora_trainer.shapes import Shapes
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec

if TYPE_CHECKING:
    from qlora_trainer.fast.step import MicroStep

SPARE = 1.05
"""How much more than planned torch may hold before it gives back what it doesn't use."""


class SimilarLengths(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' groupByLength, in an order that follows from seed and epoch alone.

    transformers draws it from torch's global generator, so that a run that resumes within an epoch would go on with
    other rows than those that are left.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Any:
        """Indices of all rows: one pass."""
        self.generator.manual_seed(self._seed + self._epoch())
        return super().__iter__()


class Unsloth(TrainerCallback):  # type: ignore[misc]
    """Readies Unsloth's model, which may have answered prompts before."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Before the first step, of a run that resumes too."""
        unsloth_backend.ready_to_train(model)


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that counts tokens, evaluates token by token, and never asks the GPU for a number inside a step."""

    get_batch_samples = transformers.Trainer.get_batch_samples
    """Counts what a step's loss is divided by. Named here since Unsloth puts its own in there when it loads a model."""

    def __init__(self, *, plan: Plan, shapes: Shapes, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tokens_seen = 0
        self.fast: MicroStep | None = None
        self.fused_head = not self.args.use_cpu  # its kernels need a GPU
        self._plan = plan
        self._reservable = None if self.args.use_cpu or shapes.steady else reservable(plan)
        # TRL rounds the adapter to bfloat16. Its updates are smaller than bfloat16 resolves, and fp16's gradient
        # scaler refuses bfloat16 gradients: keep it in float32.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)

    def use_fast_path(self, hardware: Hardware, shapes: Shapes, longest: int) -> None:
        """Compute the training steps on the fast path, where model and machine allow it. It is made for GPUs.

        No row has more than `longest` tokens, padding apart.
        """
        if hardware.on_gpu:
            from qlora_trainer.fast.step import start  # needs Triton, which is where GPUs are

            self.fast = start(self.model, self._plan, hardware, self.accelerator.backward, shapes, longest)

    def check_head(self) -> str | None:
        """See whether TRL's fused head knows this model. Returns why it isn't taken, or None."""
        reason = why_not_fused(self.model)
        self.fused_head = reason is None
        return f"the loss holds all of a micro batch's logits at once: {reason}" if reason else None

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """The optimizer. It pages its states only where they are large, or the plan trades time for memory anyway."""
        made = super().create_optimizer(*args, **options)
        if not self.args.use_cpu:
            let_optimizers_run_ahead()
            if not self._plan.offload_checkpoints:
                keep_small_states_resident(self.optimizer, gpu_memory())
        return made

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro batch."""
        self.tokens_seen += inputs[TOKEN_COUNT]
        if self._reservable is not None and torch.cuda.memory_reserved() > self._reservable:
            torch.cuda.empty_cache()  # blocks of other shapes' sizes, of which this one may find no use
        if self.fast is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        return self.fast(self._prepare_inputs(inputs), num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of TRL's fused head, which keeps the logits out of memory, or transformers'.

        TRL itself goes on to wait for the batch's entropy and accuracy, which nobody here looks at.
        """
        inputs = {**model_inputs(inputs), "use_cache": False}  # with one, transformers looks for no packed documents
        if not self.fused_head:
            return transformers.Trainer.compute_loss(
                self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
        items = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(items).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """transformers' own choice, which is the same again for a run that resumes."""
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        steps = math.ceil(len(sampler) / self.get_total_train_batch_size(self.args))
        return SimilarLengths(sampler, self.args.seed, lambda: self.state.global_step // steps)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers walks all modules for it, in every step."""
        return 0

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The validation loss, for the callbacks. transformers' own is a mean of batch means."""
        metrics = {"eval_loss": self.validation_loss()}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validation_loss(self) -> float:
        """Mean loss of a token of the rows held out."""
        return mean_loss(self.model, self.get_eval_dataloader(), fused_head=self.fused_head)

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
    train_rows = as_dataset(data.train, folder)
    held_out = as_dataset(data.validation, folder) if data.validation else None
    lengths = {length for rows in (train_rows, held_out) if rows is not None for length in rows.unique("length")}
    packed, unsloth = spec.training.packing, unsloth_backend.wanted(spec)
    shapes = Shapes.of(plan.micro_batch_size, lengths, spec.training.max_sequence_length, packed=packed)
    trainer = Trainer(
        plan=plan,
        shapes=shapes,
        model=model,
        args=_arguments(spec, plan, hardware, total_steps, folder, evaluates=_evaluates_while_training(spec, data)),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=Collator(
            tokenizer.pad_token_id,
            packed=packed,
            multiple=shapes.multiple if hardware.on_gpu else 1,
            end_to_end=unsloth,
        ),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if unsloth:  # whose layers are fast, and checkpointed, in its own way
        trainer.add_callback(Unsloth())
        return trainer
    trainer.use_fast_path(hardware, shapes, spec.training.max_sequence_length)
    if trainer.fast is None:
        hardware.degrade(checkpoint_layers(model, plan))
        if hardware.on_gpu:
            hardware.degrade(trainer.check_head())
    return trainer


def reservable(plan: Plan) -> int | None:
    """Bytes that torch may hold between two micro batches: a little more than planned. None: as many as it likes."""
    if "context" not in plan.breakdown:
        return None
    return int(SPARE * (plan.predicted_peak_bytes - plan.breakdown["context"]))


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
        logging_nan_inf_filter=False,  # a loss that isn't a number is told, and the GPU isn't waited for
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=(training.eval_steps or training.save_steps) if evaluates else None,
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
    """Whether the validation loss is looked at on the way: where that is asked for, else with each checkpoint.

    The latter only where it costs less than the training between two. A forward pass is a third of a training step, so
    a validation set as large as the interval adds a third.
    """
    if data.validation is None:
        return False
    if spec.training.eval_steps is not None:
        return True
    return len(data.validation.sequences) <= spec.training.save_steps * spec.training.global_batch_size
