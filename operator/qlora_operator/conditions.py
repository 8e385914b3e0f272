"""From an outcome to phase and conditions that kubectl wait, kstatus and Argo CD read right. Pure.

Ready is there from the first look, and True only when everything asked for is in S3. Reconciling and Stalled exist only
while they hold. Complete, Failed and Finished exist only at the end, so that they are exclusive and stick.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from qlora_operator.outcome import Kind, Outcome
from qlorajob.errors import Reason
from qlorajob.status import Condition, ConditionType, Display, Prepared, QLoRAJobStatus

MAX_MESSAGE = 4096
Truth = Literal["True", "False"]
Wanted = dict[ConditionType, tuple[Truth, str, str]]


def find(status: QLoRAJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of that type, whatever its status."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def is_true(status: QLoRAJobStatus, kind: ConditionType) -> bool:
    """The condition is there and holds."""
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def promoted(status: QLoRAJobStatus) -> bool | None:
    """Whether the run passed its gate; None without a gate."""
    condition = find(status, "Promoted")
    return None if condition is None else condition.status == "True"


def with_promoted(status: QLoRAJobStatus, value: bool | None, generation: int, now: datetime) -> QLoRAJobStatus:
    """Record the gate's verdict, or that there is none."""
    others = tuple(condition for condition in status.conditions if condition.type != "Promoted")
    if value is None:
        return status.model_copy(update={"conditions": others})
    verdict = (
        ("True", "BetterThanBase", "The adapter passed its gate: latest.json points to it")
        if value
        else (
            "False",
            Reason.NOT_BETTER_THAN_BASE,
            "The adapter doesn't beat the base model on the validation rows: latest.json hasn't moved",
        )
    )
    condition = _condition(status, "Promoted", verdict, generation, now)  # type: ignore[arg-type]
    return status.model_copy(update={"conditions": (*others, condition)})


def apply(status: QLoRAJobStatus, outcome: Outcome, generation: int, now: datetime) -> QLoRAJobStatus:
    """`status` with the outcome's phase and conditions."""
    wanted = _wanted(status, outcome)
    conditions = [_condition(status, kind, value, generation, now) for kind, value in wanted.items()]
    verdict = find(status, "Promoted")
    if verdict:
        conditions.append(verdict.model_copy(update={"observed_generation": generation}))
    display = Display.of(status.progress, status.plan)
    return status.model_copy(
        update={
            "observed_generation": generation,
            "phase": outcome.phase,
            "conditions": tuple(conditions),
            "display": display if display != Display() else None,
        }
    )


def _wanted(status: QLoRAJobStatus, outcome: Outcome) -> Wanted:
    words = (outcome.reason, outcome.message)
    wanted: Wanted = {"Ready": ("True" if outcome.kind is Kind.SUCCEEDED else "False", *words)}
    if outcome.kind is Kind.WORKING:
        wanted["Reconciling"] = ("True", *words)
    if outcome.kind in (Kind.WAITING, Kind.FAILED):
        wanted["Stalled"] = ("True", *words)
    if outcome.kind is Kind.SUSPENDED:
        wanted["Suspended"] = ("True", *words)
    elif find(status, "Suspended"):
        wanted["Suspended"] = ("False", "Resumed", "spec.suspend is false")
    if outcome.kind is Kind.SUCCEEDED:
        wanted["Complete"] = ("True", *words)
        wanted["Finished"] = ("True", "Succeeded", outcome.message)
    if outcome.kind is Kind.FAILED:
        wanted["Failed"] = ("True", *words)
        wanted["Finished"] = ("True", "Failed", outcome.message)
    if status.prepared:
        wanted["Prepared"] = ("True", "Prepared", summary(status.prepared))
    else:
        wanted["Prepared"] = ("False", Reason.PREPARING, "Model, data and output haven't been looked at yet")
    return wanted


def summary(prepared: Prepared) -> str:
    """What prepare found out, in a line."""
    return (
        f"Run {prepared.run_id}: {prepared.train_rows} training and {prepared.validation_rows} validation rows, "
        f"{prepared.train_tokens} tokens, {prepared.total_steps} steps"
    )


def _condition(
    status: QLoRAJobStatus, kind: ConditionType, value: tuple[Truth, str, str], generation: int, now: datetime
) -> Condition:
    truth, reason, message = value
    before = find(status, kind)
    same = before is not None and before.status == truth
    return Condition(
        type=kind,
        status=truth,
        reason=str(reason),
        message=message[:MAX_MESSAGE],
        last_transition_time=before.last_transition_time if before and same else now,
        observed_generation=generation,
    )
