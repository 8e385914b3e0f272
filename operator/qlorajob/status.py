"""What the operator writes under `status:`, and the pieces of it that the trainer reports."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field

from qlorajob.base import ContractModel
from qlorajob.plan import ModelFacts, Plan


class Phase(StrEnum):
    """One word on where the job is. For people; programs read the conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    TRAINING = "Training"
    MERGING = "Merging"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


ConditionType = Literal[
    "Ready", "Reconciling", "Stalled", "Complete", "Failed", "Finished", "Suspended", "Prepared", "Promoted"
]


class Condition(ContractModel):
    """A condition as in metav1.Condition."""

    type: ConditionType
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    """CamelCase word for programs."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Sentence for people."""
    last_transition_time: AwareDatetime
    """When status last changed."""
    observed_generation: int = 0
    """metadata.generation that this was true for."""


class RunStatus(ContractModel):
    """The run that the current spec asks for."""

    id: str
    """Digest of everything that changes the result."""
    attempt: Annotated[int, Field(ge=0)] = 0
    """Training Jobs created for this run so far."""
    started_at: AwareDatetime | None = None
    """When the first training Job was created."""
    finished_at: AwareDatetime | None = None
    """When the run ended."""
    plan_key: Annotated[str, Field(max_length=64)] | None = None
    """Digest of the spec fields that status.plan was made for."""
    replans: Annotated[int, Field(ge=0)] = 0
    """How often the run was out of GPU memory and got a smaller plan; an edit of what is planned begins anew."""


class SavedCheckpoint(ContractModel):
    """The newest checkpoint in S3: where training goes on after its pod is lost."""

    step: Annotated[int, Field(ge=1)]
    """Optimizer steps done."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of all its files."""
    seconds: Annotated[float, Field(ge=0)]
    """How long its upload took, retries included: what a pod's grace period has to cover."""


class Progress(ContractModel):
    """Where training is. Served by the trainer on /progress and copied into the status."""

    step: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps done."""
    total_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps to do."""
    epoch: float = 0.0
    """Passes over the data done."""
    loss: float | None = None
    """Training loss, mean over the last logging interval."""
    first_loss: float | None = None
    """Training loss of the first logging interval."""
    eval_loss: float | None = None
    """Validation loss of the tuned model."""
    base_eval_loss: float | None = None
    """Validation loss of the base model."""
    tokens_per_second: float | None = None
    """Training tokens a second, without padding."""
    eta_seconds: int | None = None
    """Estimated time to the last step."""
    checkpoint: SavedCheckpoint | None = None
    """The newest checkpoint in S3."""
    updated_at: AwareDatetime | None = None
    """When the trainer said this."""


class Display(ContractModel):
    """The columns of `kubectl get qlj`, as text: the API server's table would print a loss with 16 digits."""

    step: str | None = None
    """Steps done and to do, as in 12/60."""
    loss: str | None = None
    """Training loss."""
    tokens_per_second: str | None = None
    """Training tokens a second."""
    eta: str | None = None
    """Estimated time left, while there is some."""
    gpu: str | None = None
    """GPU class, with the number of GPUs when there are several."""

    @classmethod
    def of(cls, progress: Progress | None, plan: Plan | None) -> Self:
        """What can be shown of `progress` and `plan`."""
        shown = progress or Progress()
        return cls(
            step=f"{shown.step}/{shown.total_steps}" if shown.total_steps else None,
            loss=None if shown.loss is None else f"{shown.loss:.3f}",
            tokens_per_second=None if shown.tokens_per_second is None else f"{shown.tokens_per_second:.0f}",
            eta=_duration(shown.eta_seconds) if shown.eta_seconds else None,
            gpu=plan and (f"{plan.gpus}x{plan.gpu_class}" if plan.gpus > 1 else plan.gpu_class),
        )


def _duration(seconds: int) -> str:
    """The two largest units, as kubectl prints an age: 45s, 3m20s, 2h5m, 1d4h."""
    units = [("d", seconds // 86400), ("h", seconds // 3600 % 24), ("m", seconds // 60 % 60), ("s", seconds % 60)]
    first = next((i for i, (_, count) in enumerate(units) if count), len(units) - 1)
    return "".join(f"{count}{unit}" for unit, count in units[first : first + 2] if count) or "0s"


class MemoryStatus(ContractModel):
    """Predicted and measured memory of one GPU (of the process on CPU), and the speed that went with it."""

    peak_bytes: int | None = None
    """Measured peak."""
    predicted_bytes: int | None = None
    """What the plan predicted."""
    tokens_per_second: float | None = None
    """Measured speed of the finished run, without padding."""


class Artifact(ContractModel):
    """A result in S3."""

    uri: Annotated[str, Field(max_length=560)]
    """Where it is."""
    digest: Annotated[str, Field(max_length=71)] | None = None
    """sha256: and the SHA-256 of the artifact's files, as the manifest lists them."""
    bytes: Annotated[int, Field(ge=0)] | None = None
    """Size of all its files."""


class Artifacts(ContractModel):
    """What a run left in S3."""

    adapter: Artifact | None = None
    """The LoRA adapter, in PEFT's layout."""
    merged: Artifact | None = None
    """The merged model, in transformers' layout."""
    gguf: Artifact | None = None
    """The merged model for llama.cpp."""
    report: Artifact | None = None
    """report.json."""


class DataSummary(ContractModel):
    """What became of the dataset's rows, and how long they are."""

    read_rows: int
    """Rows that were read."""
    dropped: Mapping[str, int] = Field(default={})
    """Rows that aren't used, by reason: filter, empty, cut (nothing to learn before maxSequenceLength), duplicate."""
    truncated_rows: int = 0
    """Training rows that are cut at maxSequenceLength."""
    shared_rows: int = 0
    """Training rows that stand in the validation data too: they make its loss look better than it is."""
    learnt_tokens: int = 0
    """Tokens of one pass that count in the loss: without prompts, where only answers are learnt."""
    longest_row: int = 0
    """Tokens of the longest training row, before it is cut."""
    lengths: Mapping[str, int] = Field(default={})
    """Training rows by length before they are cut: how many have at most 16, 32, 64, … tokens, each counted once."""


class Prepared(ContractModel):
    """What `prepare` found out: identity of the inputs and size of the work."""

    key: Annotated[str, Field(max_length=64)]
    """Digest of the spec fields that prepare looked at."""
    run_id: Annotated[str, Field(max_length=64)]
    """Digest of everything that changes the result."""
    model_revision: Annotated[str, Field(max_length=128)]
    """Commit of a hub repository, or digest of the weight files."""
    dataset_digest: Annotated[str, Field(max_length=80)]
    """Digest of the training and validation data."""
    train_rows: int
    """Rows to train on, after filter and split."""
    validation_rows: int = 0
    """Held-out rows."""
    dropped_rows: int = 0
    """Rows that aren't used."""
    data: DataSummary | None = None
    """What became of the rows; not repeated when the run is finished already."""
    train_tokens: int
    """Tokens of one pass over the training rows."""
    total_steps: int
    """Optimizer steps of the whole run."""
    facts: ModelFacts
    """Facts of the model."""
    artifacts: Artifacts | None = None
    """Set when the finished run is already in S3: nothing is left to train."""
    promoted: bool | None = None
    """Whether that finished run passed its gate."""
    merge_key: Annotated[str, Field(max_length=64)] | None = None
    """Digest of spec.merge, where that finished run is merged as it says."""


class HistoryEntry(ContractModel):
    """An earlier run of this job."""

    id: str
    """Run id."""
    outcome: Literal["Succeeded", "Failed", "Replaced"]
    """How it ended; Replaced when the spec changed before its end."""
    finished_at: AwareDatetime | None = None
    """When it ended."""
    loss: float | None = None
    """Last training loss."""
    eval_loss: float | None = None
    """Last validation loss."""
    adapter: str | None = None
    """Where its adapter is."""


class QLoRAJobStatus(ContractModel):
    """The observed state of a QLoRAJob."""

    observed_generation: int = -1
    """metadata.generation that this status describes; -1 until the operator has seen the job."""
    phase: Phase | None = None
    """One word on where the job is."""
    conditions: tuple[Condition, ...] = ()
    """Ready, Reconciling, Stalled, Complete, Failed, Finished, Suspended, Prepared, Promoted."""
    run: RunStatus | None = None
    """The run that the current spec asks for."""
    prepared: Prepared | None = None
    """What the prepare step found out."""
    plan: Plan | None = None
    """How the run uses the hardware, and why."""
    progress: Progress | None = None
    """Where training is."""
    display: Display | None = None
    """Progress as `kubectl get` prints it: Display.of(progress, plan)."""
    memory: MemoryStatus | None = None
    """Predicted and measured memory."""
    artifacts: Artifacts | None = None
    """What is in S3."""
    history: tuple[HistoryEntry, ...] = ()
    """The last runs of earlier specs, newest first."""
    failed_generation: int | None = None
    """metadata.generation that failed; an edit of the spec tries again."""
    handled_retry_at: str | None = None
    """Last value of the annotation qlora.dev/retry-at that was acted on."""
    attempts: Mapping[str, int] = Field(default={})
    """Jobs created so far, by step. Never counts back, so that no Job's name comes twice."""
    job: str | None = None
    """The Job that does the current step, or did the last one: `kubectl logs job/<name>`."""
    warned_until: AwareDatetime | None = None
    """When the last pod ended whose warnings have been told as events."""
    merge_key: str | None = None
    """Digest of the spec.merge that the merged artifacts were made with."""
