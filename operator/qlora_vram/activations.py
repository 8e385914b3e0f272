"""What a step through the layers holds in memory, whichever way the trainer takes. The two ways implement `Step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from qlora_vram.layers import by_role
from qlora_vram.workload import Workload

FLASH_WORKSPACE: Final = 4
"""Bytes for each query number: FlashAttention adds up the queries' gradient in float32 (dq_accum)."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A time within a step, by what exists then."""

    working: int
    """Activations and gradients in use, in bytes."""
    dequantization: int = 0
    """A weight in 16 bit, and its block constants."""
    loss: int = 0
    """Logits of some tokens, and what the loss keeps."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.working + self.dequantization + self.loss


class Step(Protocol):
    """Bytes of one micro batch on one GPU."""

    @property
    def standing(self) -> dict[str, int]:
        """Buffers that live as long as the run, by component."""

    @property
    def kept(self) -> int:
        """What a layer that isn't checkpointed keeps for its backward pass."""

    @property
    def checkpoint(self) -> int:
        """What a checkpointed layer keeps on the GPU."""

    @property
    def offloaded(self) -> int:
        """What a checkpointed layer keeps in host memory, where checkpoints wait there."""

    @property
    def in_layer(self) -> tuple[Moment, ...]:
        """Moments of one layer's backward pass (its recomputation included), with all that this layer holds."""

    @property
    def in_loss(self) -> tuple[Moment, ...]:
        """Moments after the last layer, beside what the layers keep."""


def adapted_per_layer(workload: Workload) -> dict[str, float]:
    """Layers with an adapter, by role, in one decoder layer; of experts, those that a token visits."""
    layers = max(1, workload.facts.layers)
    limits = {"qkv": 6, "out": 2, "up": 4, "down": 2}  # a mixture of linear experts has hundreds
    return {
        str(name): min(sum(linear.count for linear in found) / layers, limits[name])
        for name, found in by_role(workload.targets, workload.facts).items()
    }
