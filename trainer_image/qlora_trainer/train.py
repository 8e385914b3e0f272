"""train: find that the run is done, or do it. The training itself is in `recipe`, whose imports take seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable

from qlora_trainer import unsloth_backend
from qlora_trainer.artifacts import RunStore
from qlora_trainer.checkpoints import conclude
from qlora_trainer.clock import Clock
from qlora_trainer.context import Context
from qlora_trainer.libraries import import_bitsandbytes, importing_much
from qlora_trainer.metrics import Telemetry
from qlora_trainer.model_source import weights_on_disk
from qlora_trainer.publication import PublishedElsewhere
from qlora_trainer.read_ahead import read_ahead
from qlorajob.errors import Reason, StepError
from qlorajob.manifest import ArtifactManifest
from qlorajob.plan import Plan
from qlorajob.status import Progress

logger = logging.getLogger(__name__)


def run(context: Context) -> None:
    """Train an adapter, unless its manifest is in storage already."""
    run_id = context.settings.prepared.run_id
    store = RunStore.open(context.settings, run_id, context.stop)
    manifest = store.manifest()
    already = manifest is not None
    if manifest is None:
        try:
            manifest = _train(context, store)
        except PublishedElsewhere as elsewhere:
            manifest, already = elsewhere.manifest, True
    conclude(store, manifest)  # also when it was there already: the first time may have ended just before this
    _tell(context, manifest)
    if already:
        context.outcome.reason, context.outcome.message = Reason.ALREADY_TRAINED, f"run {run_id} is already trained"


def _train(context: Context, store: RunStore) -> ArtifactManifest:
    settings, plan = context.settings, context.settings.config.plan
    if plan is None:
        raise StepError(Reason.INVALID_SPEC, "the run config holds no plan: train can't start without one")
    telemetry = Telemetry()
    telemetry.advance(total_steps=settings.prepared.total_steps)
    telemetry.serve(settings.metrics_port)  # before anything is loaded, so that loading is seen as life

    clock = Clock(logger)
    read_ahead(weights_on_disk(settings))  # while Python imports
    if unsloth_backend.wanted(settings.spec):
        unsloth_backend.import_unsloth(plan)
    else:
        wake_gpu(plan)  # likewise
    train_adapter = import_recipe()
    clock.lap("imports")
    try:
        return train_adapter(context, plan, store, telemetry, clock)
    finally:
        context.outcome.progress = telemetry.progress


def wake_gpu(plan: Plan) -> None:
    """Let the plan's GPU start."""
    with importing_much():
        from qlora_trainer import hardware
    hardware.wake_gpu(plan)


def import_recipe() -> Callable[..., ArtifactManifest]:
    """recipe.train_adapter, with all the libraries it needs."""
    with importing_much():
        import_bitsandbytes()
        from qlora_trainer.recipe import train_adapter
    return train_adapter


def _tell(context: Context, manifest: ArtifactManifest) -> None:
    outcome = context.outcome
    outcome.progress, outcome.memory = manifest.progress, manifest.memory
    outcome.artifacts, outcome.promoted = manifest.artifacts, manifest.promoted
    outcome.message = _summary(manifest)
    if manifest.promoted is False:
        outcome.reason = Reason.NOT_BETTER_THAN_BASE


def _summary(manifest: ArtifactManifest) -> str:
    progress = manifest.progress or Progress()
    text = f"trained {progress.step} steps"
    if progress.first_loss is not None and progress.loss is not None:
        text += f", loss {progress.first_loss:.3f} → {progress.loss:.3f}"
    if progress.base_eval_loss is not None and progress.eval_loss is not None:
        text += f", validation loss {progress.base_eval_loss:.3f} → {progress.eval_loss:.3f}"
    return text + (": not better than the base model, so not published" if manifest.promoted is False else "")
