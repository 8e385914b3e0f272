"""What the operator hands to a trainer pod (RunConfig) and what the pod hands back (RunReport)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field

from qlorajob.base import ContractModel
from qlorajob.errors import ExitCode, Reason
from qlorajob.names import REPORT_MAX_BYTES
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Artifacts, MemoryStatus, Prepared, Progress

Step = Literal["prepare", "train", "merge"]

WARNINGS, WARNING_LENGTH = 5, 200
"""Bounds of a report's warnings, so that they leave room for the rest."""
LEFT_OUT: tuple[Mapping[str, object], ...] = (
    {},
    {"warnings": ()},
    {"progress": None, "memory": None},
    {"prepared": None, "artifacts": None},
)
"""What a report that is too long goes without, step by step."""


class RunConfig(ContractModel):
    """Everything a step needs, in one environment variable. It holds no secret: those are references in the pod."""

    namespace: str
    """Namespace of the QLoRAJob; "" for `qlora run`."""
    name: str
    """Name of the QLoRAJob."""
    image: str = ""
    """Trainer image, for the provenance."""
    allow_remote_code: bool = False
    """The operator's policy on model.trustRemoteCode."""
    key: str
    """identity.prepare_key(spec)."""
    spec: QLoRAJobSpec
    """The manifest's spec, defaults filled in."""
    prepared: Prepared | None = None
    """What prepare found out (train and merge)."""
    plan: Plan | None = None
    """The VRAM plan (train)."""
    grace_seconds: Annotated[int | None, Field(ge=1)] = None
    """The pod's terminationGracePeriodSeconds: time from SIGTERM to SIGKILL. Kubernetes' 30 where it isn't told."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse what the operator or `qlora run` wrote. Raises pydantic.ValidationError."""
        return cls.model_validate_json(text, context={"local": True})

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


class RunReport(ContractModel):
    """How a step ended: the container's termination message."""

    step: Step
    """prepare, train or merge."""
    exit_code: ExitCode
    """The process's exit code."""
    reason: Reason
    """CamelCase word for programs."""
    message: str = ""
    """Sentence for people: what happened and what to do."""
    field: Annotated[str | None, Field(max_length=128)] = None
    """Field of the spec that is to blame, without `spec.`."""
    prepared: Prepared | None = None
    """Result of prepare."""
    progress: Progress | None = None
    """Last progress of train."""
    memory: MemoryStatus | None = None
    """Peak memory of train."""
    artifacts: Artifacts | None = None
    """What train or merge left in S3."""
    promoted: bool | None = None
    """Whether the adapter passed evaluation.gate; None without a gate."""
    warnings: tuple[Annotated[str, Field(max_length=WARNING_LENGTH)], ...] = ()
    """What went wrong and was got over, such as a checkpoint that was skipped. At most WARNINGS, the newest."""

    def to_json(self) -> str:
        """At most REPORT_MAX_BYTES long: the message is cut, then what can be told elsewhere is left out."""
        report = self
        for left_out in LEFT_OUT:
            report = report.model_copy(update=left_out)
            message = self.message
            while True:
                text = report.model_copy(update={"message": message}).model_dump_json(by_alias=True, exclude_none=True)
                if len(text.encode()) <= REPORT_MAX_BYTES:
                    return text
                if not message:
                    break
                message = _shorter(message)
        raise AssertionError("only names and numbers are left, and those are short")


def _shorter(message: str) -> str:
    """The message with its end cut off, by a tenth or to what could fit at all; "" after "…"."""
    kept = message.removesuffix("…")
    kept = kept[: min(REPORT_MAX_BYTES, len(kept) * 9 // 10)]
    return f"{kept}…" if kept else ""
