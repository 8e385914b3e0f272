"""RunReports of a made-up trainer, for tests in which no trainer runs."""

from __future__ import annotations

from typing import Any

from qlora_vram import catalog
from qlorajob.errors import ExitCode, Reason
from qlorajob.plan import ModelFacts
from qlorajob.run import RunReport
from qlorajob.status import Artifact, Artifacts, MemoryStatus, Prepared, Progress


def catalogued(name: str) -> ModelFacts:
    """Facts of a published model."""
    facts = catalog.lookup(name)
    assert facts is not None, f"{name} isn't in the catalogue"
    return facts


LLAMA_7B = catalogued("meta-llama/Llama-2-7b-hf")
TINY = catalogued("HuggingFaceTB/SmolLM2-135M-Instruct")


def artifact(run_id: str, kind: str) -> Artifact:
    return Artifact(uri=f"s3://adapters/{run_id}/{kind}", digest="sha256:00", bytes=1)


def adapter(run_id: str) -> Artifacts:
    return Artifacts(adapter=artifact(run_id, "adapter"), report=artifact(run_id, "report.json"))


def prepared(
    key: str, run_id: str = "run1", facts: ModelFacts = TINY, artifacts: Artifacts | None = None, **fields: Any
) -> Prepared:
    return Prepared(
        key=key,
        run_id=run_id,
        model_revision="m",
        dataset_digest="d",
        train_rows=100,
        validation_rows=5,
        train_tokens=4000,
        total_steps=60,
        facts=facts,
        artifacts=artifacts,
        **fields,
    )


def prepare_report(key: str, run_id: str = "run1", **fields: Any) -> RunReport:
    return RunReport(
        step="prepare", exit_code=ExitCode.DONE, reason=Reason.SUCCEEDED, prepared=prepared(key, run_id, **fields)
    )


def train_report(
    run_id: str = "run1",
    promoted: bool | None = None,
    peak_bytes: int = 3_000_000_000,
    predicted_bytes: int | None = None,
) -> RunReport:
    return RunReport(
        step="train",
        exit_code=ExitCode.DONE,
        reason=Reason.SUCCEEDED,
        artifacts=adapter(run_id),
        progress=Progress(step=60, total_steps=60, loss=0.5, first_loss=2.0, eval_loss=0.6, tokens_per_second=1234.5),
        memory=MemoryStatus(peak_bytes=peak_bytes, predicted_bytes=predicted_bytes),
        promoted=promoted,
    )


def merge_report(run_id: str = "run1", gguf: bool = False) -> RunReport:
    made = Artifacts(merged=artifact(run_id, "merged"), gguf=artifact(run_id, "gguf") if gguf else None)
    return RunReport(step="merge", exit_code=ExitCode.DONE, reason=Reason.SUCCEEDED, artifacts=made)


def failure(step: str, code: ExitCode, reason: Reason, message: str, field: str | None = None) -> RunReport:
    return RunReport.model_validate(
        {"step": step, "exitCode": code, "reason": reason, "message": message, "field": field}
    )
