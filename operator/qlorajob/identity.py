"""Which fields make a run what it is. Pure digests; the tests hold them against every field of the spec."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from qlorajob.spec import QLoRAJobSpec

SAME_RESULT_TRAINING_FIELDS: Final = frozenset(
    {"microBatchSize", "gradientCheckpointing", "loggingSteps", "saveSteps", "evalSteps", "saveTotalLimit"}
)
"""Fields of spec.training that change how a run is executed and watched, but not the adapter that comes out."""
PLANNED_SECTIONS: Final = ("model", "quantization", "lora", "training", "resources")
"""Sections of the spec that a plan follows from."""
DEFAULT_EPOCHS: Final = 3.0
"""Passes over the data when neither training.epochs nor training.maxSteps is set (a schema default can't depend)."""


def run_id(spec: QLoRAJobSpec, *, model_revision: str, dataset_digest: str) -> str:
    """16 hex digits that name a run: same inputs, same id; any field that changes the adapter changes it.

    Finished runs are found by it in S3, so it outlives releases: leave a field that is added later out of the digest
    where it has its default, or an upgrade trains everything again.
    """
    return digest(_result_fields(spec) | {"modelRevision": model_revision, "datasetDigest": dataset_digest})[:16]


def prepare_key(spec: QLoRAJobSpec) -> str:
    """16 hex digits of what `prepare` looks at: the run's fields, and where model, data and output are."""
    wire = spec.to_wire()
    places = {name: wire[name] for name in ("model", "dataset", "output")}
    return digest(_result_fields(spec) | {"places": places})[:16]


def plan_key(spec: QLoRAJobSpec) -> str:
    """16 hex digits of what a plan is made for. An edit of anything else (queue, limits) leaves the plan alone."""
    wire = spec.to_wire()
    return digest({name: wire[name] for name in PLANNED_SECTIONS})[:16]


def merge_key(spec: QLoRAJobSpec) -> str:
    """16 hex digits of what makes a merge what it is, beside the run."""
    return digest(spec.merge.to_wire())[:16]


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _result_fields(spec: QLoRAJobSpec) -> dict[str, Any]:
    """The part of the spec that changes the adapter, apart from the content of model and dataset."""
    wire = spec.to_wire()
    training = _without(wire["training"], *SAME_RESULT_TRAINING_FIELDS)
    if "maxSteps" not in training:
        training.setdefault("epochs", DEFAULT_EPOCHS)
    if "warmupSteps" in training:
        del training["warmupRatio"]
    dataset = _without(wire["dataset"], "uri")
    if "validation" in dataset:
        dataset["validation"] = _without(dataset["validation"], "uri")
    return {"dataset": dataset, "quantization": wire["quantization"], "lora": wire["lora"], "training": training}


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
