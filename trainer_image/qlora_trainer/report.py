"""report.json and the provenance: what was done, with what, and what came out."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from datetime import UTC, datetime
from typing import Any

from qlora_trainer import unsloth_backend
from qlora_trainer.data import TrainingData
from qlora_trainer.hardware import Hardware
from qlora_trainer.journal import Journal
from qlora_trainer.settings import Settings
from qlora_trainer.training import warmup_steps
from qlorajob.manifest import Provenance
from qlorajob.plan import Plan
from qlorajob.status import MemoryStatus, Progress

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)
"""Libraries whose version can change a result …"""
UNSLOTH = ("unsloth", "unsloth_zoo")
"""… and those that can in a run of that backend."""


def provenance(settings: Settings) -> Provenance:
    """Where the result came from."""
    prepared = settings.prepared
    libraries = LIBRARIES + (UNSLOTH if unsloth_backend.wanted(settings.spec) else ())
    return Provenance(
        model_uri=settings.spec.model.uri,
        model_revision=prepared.model_revision,
        dataset_uri=settings.spec.dataset.uri,
        dataset_digest=prepared.dataset_digest,
        image=settings.config.image,
        versions={"python": platform.python_version()} | {name: _version(name) for name in libraries},
        seed=settings.spec.training.seed,
        spec=settings.spec.to_wire(),
    )


def build_report(
    settings: Settings,
    plan: Plan,
    hardware: Hardware,
    *,
    model: dict[str, Any],
    data: TrainingData,
    journal: Journal,
    progress: Progress,
    memory: MemoryStatus,
    tuned_answers: list[str],
    promoted: bool | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of report.json."""
    spec = settings.spec
    prompts = zip(spec.evaluation.prompts, journal.base_answers, tuned_answers, strict=True)
    return {
        "runId": settings.prepared.run_id,
        "job": f"{settings.config.namespace}/{settings.config.name}".lstrip("/"),
        "createdAt": datetime.now(UTC).isoformat(timespec="seconds"),
        "promoted": promoted,
        "loss": {
            "first": progress.first_loss,
            "last": progress.loss,
            "curve": journal.curve,
            "evalBase": journal.base_eval_loss,
            "evalTuned": progress.eval_loss,
            "evaluations": journal.evaluations,
            "perplexityBase": _perplexity(journal.base_eval_loss),
            "perplexityTuned": _perplexity(progress.eval_loss),
        },
        "prompts": [
            {"prompt": prompt, "text": data.encoder.prompt_text(prompt), "before": before, "after": after}
            for prompt, before, after in prompts
        ],
        "model": model,
        "data": {
            "format": data.format,
            "trainRows": len(data.train.documents),
            "validationRows": len(data.validation.documents) if data.validation else 0,
            "droppedRows": data.dropped_rows,
            **data.summary.to_wire(),
            "trainTokens": data.train.tokens,
            "sequences": len(data.train.sequences),
            "packed": spec.training.packing,
            "filled": _filled(data, spec.training.max_sequence_length) if spec.training.packing else None,
        },
        "plan": {"gpuClass": plan.gpu_class, "gpus": plan.gpus, "reason": plan.reason},
        "training": {
            "steps": progress.step,
            "epochs": progress.epoch,
            "warmupSteps": warmup_steps(spec, progress.total_steps),
            "microBatchSize": plan.micro_batch_size,
            "gradientAccumulation": plan.gradient_accumulation,
            "checkpointing": plan.checkpointing,
            "device": hardware.device,
            "precision": hardware.precision,
            "optimizer": hardware.optimizer,
            "resumedAt": journal.resumed_at,
            "degradations": hardware.degradations,
        },
        "throughput": {
            "trainSeconds": round(journal.train_seconds, 3),
            "trainTokens": journal.train_tokens,
            "tokensPerSecond": _rate(journal.train_tokens, journal.train_seconds),
            "stepSeconds": _rate(journal.train_seconds, progress.step),
        },
        "memory": {
            **memory.to_wire(),
            "breakdown": dict(plan.breakdown),
            "gpuMemoryBytes": plan.gpu_memory_mib << 20 or None,
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "provenance": provenance(settings).to_wire(),
    }


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _rate(amount: float, per: float) -> float | None:
    return round(amount / per, 4) if per else None


def _filled(data: TrainingData, length: int) -> float:
    """Share of the packed sequences that isn't padding."""
    return round(data.train.tokens / (len(data.train.sequences) * length), 4)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
