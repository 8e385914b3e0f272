"""Where a job stands after one look: what reconcile decides, before it becomes phase, conditions and events. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qlorajob.status import Phase


class Kind(Enum):
    """Which of the five situations; each has its own set of conditions."""

    WORKING = "working"
    WAITING = "waiting"
    """Stuck on something a person has to provide; goes on by itself once it is there."""
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """For good: until the spec is edited or a retry is asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The situation, with the words that users and programs read."""

    kind: Kind
    phase: Phase
    reason: str
    message: str
    requeue_after: float | None = None
    """Look again after so many seconds, when no event may come."""


def working(phase: Phase, reason: str, message: str, requeue_after: float | None = None) -> Outcome:
    """Something of ours is under way."""
    return Outcome(Kind.WORKING, phase, reason, message, requeue_after)


def waiting(phase: Phase, reason: str, message: str, requeue_after: float | None = None) -> Outcome:
    """Stalled, but not for good."""
    return Outcome(Kind.WAITING, phase, reason, message, requeue_after)


def suspended(message: str) -> Outcome:
    """Paused by spec.suspend."""
    return Outcome(Kind.SUSPENDED, Phase.SUSPENDED, "Suspended", message)


def succeeded(reason: str, message: str) -> Outcome:
    """Everything the spec asks for is in S3."""
    return Outcome(Kind.SUCCEEDED, Phase.SUCCEEDED, reason, message)


def failed(reason: str, message: str) -> Outcome:
    """Over, until somebody changes something."""
    return Outcome(Kind.FAILED, Phase.FAILED, reason, message)
