"""The recipe: base in 4 bit → adapter → training → evaluation → storage. Reads from top to bottom.

May be killed anywhere and started again: the newest whole checkpoint says where to go on, and the manifest, written
last, that nothing is left to do.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_trainer import evaluation, logs, training, unsloth_backend
from qlora_trainer import model as models
from qlora_trainer.artifacts import RunStore
from qlora_trainer.callbacks import CheckpointCallback, DivergenceCallback, ProgressCallback
from qlora_trainer.checkpoints import CheckpointStore
from qlora_trainer.clock import Clock
from qlora_trainer.context import Context
from qlora_trainer.data import TrainingData, load_data
from qlora_trainer.fitting import fitted
from qlora_trainer.hardware import Hardware, peak_memory
from qlora_trainer.journal import Journal
from qlora_trainer.metrics import Telemetry
from qlora_trainer.model_source import open_model
from qlora_trainer.publication import Publication
from qlora_trainer.report import build_report, provenance
from qlora_trainer.report_page import report_files
from qlora_trainer.tensorboard import LiveCurves, events
from qlora_trainer.tokenizer import load_tokenizer
from qlora_trainer.uploads import CheckpointUploads
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import ADAPTER, EVENTS, REPORT, ArtifactManifest
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Artifacts, MemoryStatus, Progress, SavedCheckpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What is trained, on what."""

    hardware: Hardware
    tokenizer: Any
    data: TrainingData
    model: Any
    prompts: list[list[int]]


def train_adapter(
    context: Context, plan: Plan, store: RunStore, telemetry: Telemetry, clock: Clock
) -> ArtifactManifest:
    """Do the whole run, or the rest of it."""
    spec, outcome = context.spec, context.outcome
    logs.tame_libraries()
    hardware = Hardware.choose(spec, plan)
    plan = fitted(plan, spec, context.settings.prepared.facts, hardware)
    ready = load(context, plan, hardware, clock)

    checkpoints = CheckpointStore(store, keep=spec.training.save_total_limit, warn=outcome.warn)
    checkpoints.sweep()
    scratch = context.settings.folder("checkpoints")
    resume_from = checkpoints.restore_newest(scratch)
    known = Journal.load(resume_from) if resume_from else None
    journal = known or Journal()
    curves = LiveCurves(store, journal)

    def show(saved: SavedCheckpoint) -> None:
        telemetry.advance(checkpoint=saved)
        curves.upload()

    uploads = CheckpointUploads(checkpoints, context.stop, show)
    trainer = make_trainer(context, plan, ready, journal, telemetry, uploads, scratch)
    description = models.describe(trainer.model, spec.quantization)
    clock.lap("setup")

    if resume_from is not None:
        journal.resumed_at.append(int(resume_from.name.rpartition("-")[2]))
        logger.info("resuming from a checkpoint", extra={"checkpoint": journal.resumed_at[-1]})
    if known is None:
        measure_base(trainer, ready, journal, spec)
    show_known(telemetry, journal)
    clock.lap("base")

    with context.stop.deferred(), uploads:
        training.train(trainer, spec.training.seed, resume_from)
    journal.peak_bytes = max(journal.peak_bytes, peak_memory(ready.hardware))
    memory = MemoryStatus(peak_bytes=journal.peak_bytes, predicted_bytes=plan.predicted_peak_bytes)
    outcome.memory = memory
    require_finished(trainer, context.settings.prepared.total_steps)
    if not has_gate(spec):
        models.require_numbers(trainer.model, trainer.state.global_step)
    clock.lap("train")

    if ready.data.validation and journal.last_evaluation != trainer.state.global_step:
        trainer.evaluate()
    answers = evaluation.answers(trainer.model, ready.tokenizer, ready.prompts, spec.evaluation.max_new_tokens)
    progress = telemetry.progress
    promoted = passes_gate(spec, progress)
    clock.lap("evaluation")

    adapter = context.settings.folder(ADAPTER)
    save_adapter(trainer.model, ready.tokenizer, adapter, spec, context.settings.prepared.model_revision)
    results = Publication(store)
    files = (*results.tree(adapter, ADAPTER), results.content(EVENTS, events(journal)))
    clock.lap("upload")

    report = build_report(
        context.settings,
        plan,
        ready.hardware,
        model=description,
        data=ready.data,
        journal=journal,
        progress=progress,
        memory=memory,
        tuned_answers=answers,
        promoted=promoted,
        seconds=clock.laps,
    )
    files += tuple(results.content(name, content) for name, content in report_files(report).items())
    manifest = ArtifactManifest(
        run_id=store.run_id,
        created_at=datetime.now(UTC),
        files=files,
        provenance=provenance(context.settings),
        artifacts=Artifacts(adapter=store.artifact(files, ADAPTER), report=store.artifact(files, REPORT)),
        progress=progress,
        memory=memory,
        promoted=promoted,
    )
    results.publish(manifest)
    return manifest


def load(context: Context, plan: Plan, hardware: Hardware, clock: Clock) -> Ingredients:
    """Model and data onto this machine and into memory."""
    settings, spec = context.settings, context.spec
    folder = open_model(settings, settings.prepared.model_revision).weights_folder()
    tokenizer = load_tokenizer(folder, settings)
    clock.lap("download")

    data = load_data(settings, tokenizer)
    if data.digest != settings.prepared.dataset_digest:
        message = "dataset.uri: the data changed since they were prepared; apply the job again to use the new ones"
        raise StepError(Reason.DATASET_INVALID, message, field="dataset.uri")
    clock.lap("data")

    training.seed_everything(spec.training.seed)  # the adapter's first matrix is random
    if unsloth_backend.wanted(spec):
        model = unsloth_backend.load(folder, tokenizer, settings, plan, hardware)
    else:
        model = models.add_adapter(models.load_quantized(folder, settings, hardware), spec.lora)
    if spec.training.packing:
        models.require_isolated_documents(model)
    clock.lap("load")
    prompts = [data.encoder.prompt_ids(prompt) for prompt in spec.evaluation.prompts]
    return Ingredients(hardware, tokenizer, data, model, prompts)


def make_trainer(
    context: Context,
    plan: Plan,
    ready: Ingredients,
    journal: Journal,
    telemetry: Telemetry,
    uploads: CheckpointUploads,
    scratch: Path,
) -> training.Trainer:
    """The trainer, with progress and checkpoints beside it."""
    train_data = ready.data.train
    progress = ProgressCallback(
        telemetry,
        journal,
        ready.hardware,
        predicted_bytes=plan.predicted_peak_bytes,
        tokens_seen=lambda: trainer.tokens_seen,
        samples_per_step=context.spec.training.global_batch_size
        * len(train_data.documents)
        / len(train_data.sequences),
    )
    trainer = training.make_trainer(
        context.spec,
        plan,
        ready.hardware,
        model=ready.model,
        tokenizer=ready.tokenizer,
        data=ready.data,
        total_steps=context.settings.prepared.total_steps,
        folder=scratch,
        callbacks=[
            progress,
            # With a gate, an adapter that isn't made of numbers is one that isn't better than the base.
            *([] if has_gate(context.spec) else [DivergenceCallback()]),
            CheckpointCallback(uploads, journal, context.stop),
        ],
    )
    return trainer


def measure_base(trainer: training.Trainer, ready: Ingredients, journal: Journal, spec: QLoRAJobSpec) -> None:
    """Loss and answers of the base model: the adapter is there, but changes nothing before its first step."""
    journal.base_answers = evaluation.answers(
        trainer.model, ready.tokenizer, ready.prompts, spec.evaluation.max_new_tokens
    )
    if ready.data.validation:
        journal.base_eval_loss = trainer.validation_loss()


def show_known(telemetry: Telemetry, journal: Journal) -> None:
    """Show what is measured already, by this process or by those before it."""
    known: dict[str, Any] = {"base_eval_loss": journal.base_eval_loss}
    if journal.curve:
        first, last = journal.curve[0], journal.curve[-1]
        known |= {"first_loss": first["loss"], "loss": last["loss"], "step": last["step"]}
    telemetry.advance(**known)


def require_finished(trainer: training.Trainer, total_steps: int) -> None:
    """End here when the training was stopped before its last step."""
    step = trainer.state.global_step
    if step < total_steps:
        message = f"stopped after step {step} of {total_steps}; the checkpoint is in storage"
        raise StepError(Reason.INTERRUPTED, message, code=ExitCode.INTERRUPTED)


def has_gate(spec: QLoRAJobSpec) -> bool:
    """Whether the adapter is published only if it is better than the base."""
    return spec.evaluation.gate is not None and spec.evaluation.gate.must_beat_base


def passes_gate(spec: QLoRAJobSpec, progress: Progress) -> bool | None:
    """Whether the adapter may be published; None without a gate."""
    if not has_gate(spec):
        return None
    if progress.eval_loss is None or progress.base_eval_loss is None:
        return False
    return progress.eval_loss < progress.base_eval_loss


def save_adapter(model: Any, tokenizer: Any, folder: Path, spec: QLoRAJobSpec, revision: str) -> None:
    """Save in PEFT's layout, naming the base by its URI instead of by a folder of this pod."""
    config = model.peft_config["default"]
    uri = spec.model.uri
    if uri.startswith("hf://"):
        config.base_model_name_or_path, config.revision = uri.removeprefix("hf://").partition("@")[0], revision
    else:
        config.base_model_name_or_path = uri
    # Else PEFT asks the hub whether the vocabulary has grown; it never does here.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))
