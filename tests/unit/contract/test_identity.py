"""The run id changes exactly with what changes the adapter, the prepare key exactly with what `prepare` looks at.

Every field of the spec stands in DECISIONS: a new field fails here until someone decides what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from qlorajob.base import models_in
from qlorajob.identity import prepare_key, run_id
from qlorajob.spec import QLoRAJobSpec
from tests.unit.contract.manifests import manifest

RESULT = "changes the adapter"
PLACE = "prepare must look again; the adapter depends on the content found there"
NEITHER = "changes how it runs"

BASE = {
    "spec.model.tokenSecretRef": {"name": "hub", "key": "token"},
    "spec.model.cacheClaim": "cache",
    "spec.dataset.validation": {"uri": "hf://org/validation", "split": "test"},
    "spec.output.credentialsSecretRef": {"name": "s3"},
    "spec.evaluation.gate": {"mustBeatBase": True},
    "spec.merge": {"enabled": True, "gguf": {}},
    "spec.resources.tolerations": [{"key": "gpu", "effect": "NoExecute"}],
}
"""A spec in which every optional object is there, so that each field can change alone."""

DECISIONS: dict[str, tuple[Any, str]] = {
    "model.uri": ("hf://org/model@v2", PLACE),
    "model.trustRemoteCode": (True, PLACE),
    "model.tokenSecretRef.name": ("other", PLACE),
    "model.tokenSecretRef.key": ("other", PLACE),
    "model.cacheClaim": ("other", PLACE),
    "dataset.uri": ("hf://org/other", PLACE),
    "dataset.split": ("other", RESULT),
    "dataset.subset": ("other", RESULT),
    "dataset.format": ("chat", RESULT),
    **{
        f"dataset.columns.{part}": ("other", RESULT)
        for part in ("instruction", "input", "output", "text", "prompt", "completion", "messages", "tools")
    },
    "dataset.template": ("alpaca-zh", RESULT),
    "dataset.filter": ({"label": "x"}, RESULT),
    "dataset.deduplicate": (True, RESULT),
    "dataset.validation.fraction": (0.1, RESULT),
    "dataset.validation.uri": ("hf://org/other", PLACE),
    "dataset.validation.split": ("other", RESULT),
    "quantization.type": ("fp4", RESULT),
    "quantization.doubleQuant": (False, RESULT),
    "quantization.computeDtype": ("float16", RESULT),
    "lora.rank": (8, RESULT),
    "lora.alpha": (8, RESULT),
    "lora.dropout": (0.1, RESULT),
    "lora.targetModules": (["q_proj"], RESULT),
    "lora.bias": ("all", RESULT),
    "training.backend": ("unsloth", RESULT),
    "training.epochs": (1, RESULT),
    "training.maxSteps": (5, RESULT),
    "training.globalBatchSize": (32, RESULT),
    "training.microBatchSize": (2, NEITHER),
    "training.maxSequenceLength": (512, RESULT),
    "training.packing": (False, RESULT),
    "training.learningRate": (1e-4, RESULT),
    "training.scheduler": ("linear", RESULT),
    "training.warmupRatio": (0.1, RESULT),
    "training.warmupSteps": (7, RESULT),
    "training.optimizer": ("sgd", RESULT),
    "training.weightDecay": (0.1, RESULT),
    "training.maxGradNorm": (1, RESULT),
    "training.gradientCheckpointing": (True, NEITHER),
    "training.groupByLength": (True, RESULT),
    "training.precision": ("fp32", RESULT),
    "training.loggingSteps": (1, NEITHER),
    "training.saveSteps": (1, NEITHER),
    "training.evalSteps": (1, NEITHER),
    "training.saveTotalLimit": (1, NEITHER),
    "training.seed": (1, RESULT),
    "evaluation.prompts": (["Hello"], NEITHER),
    "evaluation.maxNewTokens": (8, NEITHER),
    "evaluation.gate.metric": (None, NEITHER),  # it has one value so far
    "evaluation.gate.mustBeatBase": (False, NEITHER),
    "resources.gpus": (2, NEITHER),
    "resources.gpuClass": ("a100", NEITHER),
    "resources.nodeSelector": ({"zone": "a"}, NEITHER),
    "resources.tolerations.key": ("other", NEITHER),
    "resources.tolerations.operator": ("Exists", NEITHER),
    "resources.tolerations.value": ("other", NEITHER),
    "resources.tolerations.effect": ("NoExecute", NEITHER),
    "resources.tolerations.tolerationSeconds": (5, NEITHER),
    "resources.cpu": ("4", NEITHER),
    "resources.memory": ("8Gi", NEITHER),
    "resources.ephemeralStorage": ("8Gi", NEITHER),
    "output.uri": ("s3://other/runs", PLACE),
    "output.endpoint": ("http://minio:9000", PLACE),
    "output.region": ("eu-west-1", PLACE),
    "output.credentialsSecretRef.name": ("other", PLACE),
    "merge.enabled": (False, NEITHER),
    "merge.dtype": ("float16", NEITHER),
    "merge.gguf.quantization": ("f16", NEITHER),
    "queueName": ("team", NEITHER),
    "priorityClassName": ("high", NEITHER),
    "serviceAccountName": ("trainer", NEITHER),
    "suspend": (True, NEITHER),
    "backoffLimit": (1, NEITHER),
    "activeDeadlineSeconds": (60, NEITHER),
    "ttlSecondsAfterFinished": (60, NEITHER),
}
NEEDS: dict[str, dict[str, Any]] = {
    "training.groupByLength": {"spec.training.packing": False},
    "dataset.validation.fraction": {"spec.dataset.validation": {"fraction": 0.2}},
    "merge.enabled": {"spec.merge": {"enabled": True}},
}
"""What else must be in the spec, before and after the change, for a field to be allowed."""


def fields(model: type[Any] = QLoRAJobSpec, path: str = "") -> Iterator[str]:
    """The paths of all fields that hold no further fields."""
    for field in model.model_fields.values():
        nested = next(models_in(field.annotation), None)
        name = f"{path}{field.alias}"
        yield from fields(nested, f"{name}.") if nested else (name,)


def spec(changes: dict[str, Any]) -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(manifest(changes)["spec"])


def identity(changes: dict[str, Any]) -> tuple[str, str]:
    parsed = spec(changes)
    return run_id(parsed, model_revision="r1", dataset_digest="d1"), prepare_key(parsed)


def test_every_field_of_the_spec_is_decided() -> None:
    assert set(fields()) == DECISIONS.keys()


@pytest.mark.parametrize("field", sorted(DECISIONS.keys() - {"evaluation.gate.metric"}))
def test_identities_change_exactly_with_the_fields_that_matter(field: str) -> None:
    value, decision = DECISIONS[field]
    before = BASE | NEEDS.get(field, {})
    if field.startswith("resources.tolerations."):
        toleration = {"key": "gpu", "operator": "Equal", "effect": "NoExecute"} | {field.rpartition(".")[2]: value}
        after = before | {"spec.resources.tolerations": [toleration]}
    else:
        after = before | {f"spec.{field}": value}

    old, new = identity(before), identity(after)

    assert (old[0] != new[0]) == (decision == RESULT)
    assert (old[1] != new[1]) == (decision in (RESULT, PLACE))


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.training.epochs": 3},
        {"spec.training.epochs": 3.0},
        {"spec.training.epochs": None},
        {"spec.lora": {}},
        {"spec.lora.rank": 16.0},
        {"spec.lora": {"rank": 16, "alpha": 32, "targetModules": "all-linear"}},
        {"spec.training.weightDecay": 0},
        {"spec.dataset.filter": {"label": None}},
        {"spec": spec({}).to_wire()},
    ],
    ids=str,
)
def test_what_is_written_out_is_what_is_left_out(changes: dict[str, Any]) -> None:
    assert identity(changes) == identity({})


def test_the_warmup_ratio_is_unused_when_warmup_steps_are_set() -> None:
    steps = {"spec.training.warmupSteps": 10}

    assert identity(steps) == identity(steps | {"spec.training.warmupRatio": 0.5})
    assert identity(steps) != identity({})


def test_default_epochs_are_unused_when_max_steps_are_set() -> None:
    assert identity({"spec.training.maxSteps": 5}) != identity({"spec.training.epochs": 3})


def test_the_run_id_changes_with_the_content_of_model_and_data() -> None:
    ids = {run_id(spec({}), model_revision=revision, dataset_digest=data) for revision in ("r1", "r2") for data in "ab"}

    assert len(ids) == 4


def test_ids_are_stable_between_releases() -> None:
    """A changed id trains everyone's finished jobs again: change the test only with a note in CHANGELOG.md."""
    assert identity({}) == ("6fab58b29924a7f7", "c960f67cde89194e")
