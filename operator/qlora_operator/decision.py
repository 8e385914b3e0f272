"""What reconcile hands to whoever carries it out. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qlora_operator.placement import Manifest
from qlora_vram.observations import Observation
from qlorajob.status import QLoRAJobStatus

MAX_EVENT_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class CreateJob:
    """Make this Job; done when one of this name exists and is ours."""

    manifest: Manifest

    @property
    def name(self) -> str:
        """Deterministic; see manifests.child_name."""
        return str(self.manifest["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Remove this very Job (by uid), its pods after it."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class CreateClaimTemplate:
    """Make this ResourceClaimTemplate; done when one of this name exists, since the name says what is in it."""

    manifest: Manifest

    @property
    def name(self) -> str:
        """Deterministic; see manifests.claim_template."""
        return str(self.manifest["metadata"]["name"])


Action = CreateJob | DeleteJob | CreateClaimTemplate


@dataclass(frozen=True, slots=True)
class Event:
    """An event on the QLoRAJob."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str

    def __post_init__(self) -> None:
        if len(self.message) > MAX_EVENT_MESSAGE:
            object.__setattr__(self, "message", self.message[: MAX_EVENT_MESSAGE - 1] + "…")


@dataclass(frozen=True, slots=True)
class Measurement:
    """A value for a histogram of the operator's metrics, or something to count."""

    name: Literal["queue_seconds", "vram_prediction_ratio", "oom_replans"]
    value: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Carry out `actions`, keep `observations`, write `status`, then send `events`."""

    status: QLoRAJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    measurements: tuple[Measurement, ...] = field(default=())
    observations: tuple[Observation, ...] = field(default=())
    """Told again after a crash; the same run's is the same."""
