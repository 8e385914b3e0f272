"""What planning can come to beside a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlorajob.errors import Reason


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One change after which there is a plan; the planner was asked."""

    field: str
    """Path in the spec, such as training.maxSequenceLength."""
    value: Any
    """What to set it to."""
    gpu_class: str
    """Where it would run then."""


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """No plan, and why, in a sentence for the user."""

    reason: Reason
    message: str
    """At most 1,024 characters."""
    field: str
    """Path in the spec of what stands in the way most."""
    suggestions: tuple[Suggestion, ...] = ()
    """The nearest changes that would do, in the order in which they are worth trying."""
