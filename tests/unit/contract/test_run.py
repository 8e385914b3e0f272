"""What passes between operator and trainer: the run config in an environment variable, the report in 4,096 bytes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlorajob.errors import ExitCode, Reason
from qlorajob.identity import prepare_key
from qlorajob.names import REPORT_MAX_BYTES
from qlorajob.plan import ModelFacts, Plan, Requests
from qlorajob.resource import parse
from qlorajob.run import WARNING_LENGTH, WARNINGS, RunConfig, RunReport
from qlorajob.status import Artifact, Artifacts, DataSummary, MemoryStatus, Prepared, Progress, SavedCheckpoint
from tests.unit.contract.manifests import manifest

LONGEST_ENVIRONMENT_STRING = 128 * 1024
"""Linux's MAX_ARG_STRLEN: beyond it, the container doesn't start."""

HUGE = 2**63 - 1
ARTIFACT = Artifact(uri="s3://" + "b" * 555, digest="sha256:" + "f" * 64, bytes=HUGE)
ARTIFACTS = Artifacts(adapter=ARTIFACT, merged=ARTIFACT, gguf=ARTIFACT, report=ARTIFACT)
NOW = datetime(2026, 1, 1, 12, 30, 15, 123456, UTC)
FACTS = ModelFacts(
    model_type="m" * 64, parameters=HUGE, layers=HUGE, hidden_size=HUGE, vocabulary=HUGE, weight_bytes=HUGE
)
PREPARED = Prepared(
    key="k" * 64, run_id="r" * 64, model_revision="r" * 128, dataset_digest="d" * 80, train_rows=HUGE,
    validation_rows=HUGE, dropped_rows=HUGE, train_tokens=HUGE, total_steps=HUGE, facts=FACTS, artifacts=ARTIFACTS,
    promoted=False,
)  # fmt: skip
DATA = DataSummary(
    read_rows=HUGE, truncated_rows=HUGE, shared_rows=HUGE, learnt_tokens=HUGE, longest_row=HUGE,
    dropped=dict.fromkeys(("filter", "empty", "cut", "duplicate"), HUGE),
    lengths={str(16 << n): HUGE for n in range(17)},
)  # fmt: skip
LOSS = 1.2345678901234567e-100
PROGRESS = Progress(
    step=HUGE, total_steps=HUGE, epoch=LOSS, loss=LOSS, first_loss=LOSS, eval_loss=LOSS, base_eval_loss=LOSS,
    tokens_per_second=LOSS, eta_seconds=HUGE, checkpoint=SavedCheckpoint(step=HUGE, bytes=HUGE, seconds=LOSS),
    updated_at=NOW,
)  # fmt: skip
MEMORY = MemoryStatus(peak_bytes=HUGE, predicted_bytes=HUGE)
PLAN = Plan(
    gpu_class="a100-80gb", gpus=1, predicted_peak_bytes=10**10, breakdown={"weights": 1}, micro_batch_size=4,
    gradient_accumulation=4, checkpointing="none", requests=Requests(cpu="4", memory="8Gi", ephemeral_storage="1Gi"),
    reason="it fits",
)  # fmt: skip

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text('\x00\n"\\é名😀', min_size=500, max_size=6000)


def report(step: str, **fields: Any) -> RunReport:
    return RunReport.model_validate(
        {"step": step, "exitCode": ExitCode.INVALID, "reason": Reason.DATASET_INVALID, "field": "f" * 128} | fields
    )


def config(spec: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    parsed = parse(manifest(spec), local=True).spec
    return RunConfig(namespace="team", name="job", key=prepare_key(parsed), spec=parsed, **fields)


@pytest.mark.parametrize(
    "longest",
    [
        report("prepare", prepared=PREPARED),
        report("prepare", prepared=PREPARED.model_copy(update={"artifacts": None, "data": DATA})),
        report("train", artifacts=ARTIFACTS, progress=PROGRESS, memory=MEMORY, promoted=False),
        report("merge", artifacts=ARTIFACTS),
    ],
    ids=["prepare, finished before", "prepare", "train", "merge"],
)
@given(message=texts)
def test_a_report_fits_a_termination_message_and_only_its_message_is_cut(longest: RunReport, message: str) -> None:
    told = longest.model_copy(update={"message": message})

    text = told.to_json()

    assert len(text.encode()) <= REPORT_MAX_BYTES
    received = RunReport.model_validate_json(text)
    assert received.model_copy(update={"message": ""}) == told.model_copy(update={"message": ""})
    assert received.message in (message, "") or message.startswith(received.message.removesuffix("…"))


def test_a_short_message_is_told_in_full() -> None:
    told = report("train", message="the dataset is empty")

    assert RunReport.model_validate_json(told.to_json()) == told


def test_warnings_are_told_beside_the_rest() -> None:
    warnings = ("w" * WARNING_LENGTH,) * WARNINGS
    told = report("train", artifacts=Artifacts(adapter=ARTIFACT), progress=PROGRESS, memory=MEMORY, warnings=warnings)

    assert RunReport.model_validate_json(told.to_json()) == told


def test_warnings_are_the_first_to_go() -> None:
    warnings = ("\x00" * WARNING_LENGTH,) * WARNINGS  # six bytes each, in JSON
    told = report("train", message="m" * 10_000, progress=PROGRESS, warnings=warnings)

    received = RunReport.model_validate_json(told.to_json())

    assert (received.warnings, received.progress) == ((), PROGRESS)


def test_even_an_impossibly_long_report_fits() -> None:
    told = report("train", message="m" * 10_000, prepared=PREPARED, artifacts=ARTIFACTS, progress=PROGRESS)

    received = RunReport.model_validate_json(told.to_json())

    assert (received.exit_code, received.reason, received.field) == (told.exit_code, told.reason, told.field)
    assert received.message.startswith("mmm")


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({}, {}),
        ({"spec.model.uri": "file:///models/mine", "spec.output.uri": "file:///tmp/out"}, {}),
        ({"spec.lora.targetModules": ["q_proj"], "spec.resources.cpu": 4, "spec.training.microBatchSize": 2}, {}),
        ({"spec.training.gradientCheckpointing": True, "spec.dataset.filter": {"label": "x"}}, {}),
        ({"spec.resources.tolerations": [{"operator": "Exists"}]}, {"prepared": PREPARED, "plan": PLAN}),
    ],
    ids=["minimal", "local files", "unions", "maps", "with what prepare found"],
)
def test_a_run_config_survives_its_journey(spec: dict[str, Any], fields: dict[str, Any]) -> None:
    sent = config(spec, **fields)

    assert RunConfig.from_json(sent.to_json()) == sent


@given(prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200))
def test_a_run_config_keeps_any_text(prompt: str) -> None:
    sent = config({"spec.evaluation.prompts": [prompt], "spec.dataset.template": f"{prompt}\n\t"})

    assert RunConfig.from_json(sent.to_json()) == sent


def test_the_longest_spec_fits_an_environment_variable() -> None:
    wide = "😀"
    sent = config(
        {
            "spec.evaluation.prompts": [wide * 4096, wide * 4096],
            "spec.dataset.template": wide * 4096,
            "spec.dataset.filter": {f"{n:02}" + wide * 126: wide * 256 for n in range(16)},
            "spec.dataset.columns": dict.fromkeys(
                ("instruction", "input", "output", "text", "prompt", "completion", "messages", "tools"), wide * 128
            ),
            "spec.dataset.uri": "s3://bucket/" + wide * 1012,
            "spec.dataset.split": wide * 128,
            "spec.dataset.validation": {"uri": "s3://bucket/" + wide * 1012, "split": wide * 128},
            "spec.model.uri": "s3://bucket/" + wide * 1012,
            "spec.lora.targetModules": ["q" * 128] * 64,
            "spec.output.uri": "s3://bucket/" + "p" * 500,
            "spec.output.endpoint": "https://" + "h" * 504,
            "spec.resources.nodeSelector": {f"{'a' * 253}/{'k' * 61}{n:02}": "v" * 63 for n in range(16)},
            "spec.resources.tolerations": [{"key": f"{'a' * 253}/{'k' * 63}", "value": "v" * 63}] * 16,
        },
        prepared=PREPARED,
        plan=PLAN,
    )

    assert len(sent.to_json().encode()) < LONGEST_ENVIRONMENT_STRING


def test_what_an_operator_wrote_before_fields_came_is_read_without_them() -> None:
    sent = json.loads(config(plan=PLAN, prepared=PREPARED).to_json())
    facts = sent["prepared"]["facts"]
    for each, name in ((sent["plan"], "cacheWeights"), (facts, "wholeLogits"), (facts, "regularLength")):
        each.pop(name, None)

    read = RunConfig.from_json(json.dumps(sent))

    assert read.plan is not None
    assert read.prepared is not None
    assert (read.plan.cache_weights, read.prepared.facts.whole_logits) == (False, False)
    assert read.prepared.facts.regular_length is None


def test_the_contract_is_frozen_and_refuses_unknown_fields() -> None:
    sent = config()

    with pytest.raises(ValidationError, match="frozen"):
        sent.spec.lora.rank = 8  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunConfig.from_json(json.dumps(json.loads(sent.to_json()) | {"unknown": 1}))
