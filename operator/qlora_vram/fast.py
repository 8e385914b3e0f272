"""Memory of a step on the trainer's fast path (`qlora_trainer.fast`), whose layers say themselves what they keep.

A layer keeps (`fast.layer.Kept`) its input, q, k and v, attention's result with a float32 for each head, the residual
stream between attention and feed-forward part, gate and up, and the products of LoRA's A. Norms, those of heads too,
activation and dropout masks are computed again. Nothing is as long as a row times a row. All weights are dequantized
into one buffer, which stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from qlora_vram.activations import FLASH_WORKSPACE, Moment
from qlora_vram.layers import Layer, Role, by_role
from qlora_vram.optimizers import GRADIENT, optimizer_bytes
from qlora_vram.workload import Workload

RANK_STEP: Final = 16
"""Ranks are filled up with zeros to a multiple of this, the least a tensor core takes (`fast.linears` takes this number
from here)."""
ROW_STEP: Final = 64
"""Rows of operands with something beside them begin at a multiple of so many numbers, a cache line's 128 bytes
(`fast.linears`, likewise)."""
LOGIT_BYTES: Final = 256 * 2**20
"""Logits that exist at once (`fast.cross_entropy.CHUNK_BYTES`) …"""
LOGIT_ROWS: Final = 64
"""… in a multiple of so many tokens."""
GRAPH_TOKENS: Final = 4096
"""Micro batches of at most so many tokens are launch-bound: a layer's kernels run faster than Python starts them.

Runs all of whose micro batches are so small replay them as CUDA graphs (`fast.step` takes this number from here): a
graph's memory is its own, and a large micro batch, run eagerly, would come on top.
"""
SECOND_STREAM_BYTES: Final = 80_000_000
"""What the driver counts for a CUDA graph, or for copies to and from the host beside the work (measured: 78 to 103 MB,
whatever the model's size)."""
GROUPS: Final[tuple[Role, ...]] = ("qkv", "out", "up", "down")
"""Linear layers with one input run as one."""


@dataclass(frozen=True)
class FastStep:
    """Implements `activations.Step`. Sizes of tensors are in bytes, for a whole micro batch."""

    workload: Workload

    @cached_property
    def _layer(self) -> Layer:
        return self.workload.layer

    def _size(self, numbers: float) -> int:
        """Bytes of so many numbers a token, in the compute type."""
        return int(self.workload.tokens * numbers * self.workload.compute_bytes)

    @cached_property
    def _ranks(self) -> dict[Role, int]:
        """Rank of each group's adapter, all its linears together."""
        found = by_role(self.workload.targets, self.workload.facts)
        filled = -(-self.workload.rank // RANK_STEP) * RANK_STEP
        return {name: filled * len(found[name]) for name in GROUPS}

    def _room(self, name: Role, inputs: int) -> int:
        """Numbers beside each row of a weight, and of its input, for the adapter (`Group.row`)."""
        if name == "up" or not self._ranks[name]:
            return 0
        return -(-(inputs + self._ranks[name]) // ROW_STEP) * ROW_STEP - inputs

    @property
    def standing(self) -> dict[str, int]:
        """All weights, or a buffer for the largest group's; the adapters in the compute type, filled up with zeros."""
        size, layers = self.workload.compute_bytes, max(1, self.workload.facts.layers)
        groups = by_role(self.workload.facts.linears, self.workload.facts)
        largest = copies = weights = 0
        for name in GROUPS:
            inputs = max((linear.inputs for linear in groups[name]), default=0)
            outputs = sum(linear.outputs * linear.count for linear in groups[name]) // layers
            weight = (inputs + self._room(name, inputs)) * outputs
            largest, weights = max(largest, weight), weights + weight * layers
            copies += self._ranks[name] * (inputs + outputs) * layers
        beside = SECOND_STREAM_BYTES if self.graphs or self.workload.shape.offload else 0
        dequantized = (
            {"weightCache": size * weights} if self.workload.shape.cached else {"dequantization": size * largest}
        )
        return {
            **dequantized, "adapter": size * copies, "slack": self._between_what_stays, "context": beside,
        }  # fmt: skip

    @property
    def _between_what_stays(self) -> int:
        """What the allocator holds between tensors that came while activations lay around them, and can't use again.

        Measured, as what torch reserves beyond what it allocates: where micro batches are small, as much as the states
        that bitsandbytes makes after the first of them; and with scaled gradients twice those.
        """
        work = self.workload
        small = work.tokens <= GRAPH_TOKENS and not work.shape.offload and work.optimizer.endswith("bit")
        states = optimizer_bytes(work) if small else 0
        return states + (2 * GRADIENT * work.adapter_parameters if work.scaled else 0)

    @property
    def graphs(self) -> bool:
        """Micro batches are replayed as CUDA graphs."""
        return self.workload.tokens <= GRAPH_TOKENS and not (self.workload.shape.offload or self.workload.scaled)

    @cached_property
    def kept(self) -> int:
        """`fast.layer.Kept`."""
        layer = self._layer
        attention = 2 * layer.queries + 2 * layer.keys
        numbers = 2 * layer.hidden + attention + 2 * layer.inside + sum(self._ranks.values())
        return self._size(numbers) + self._statistics

    @cached_property
    def _statistics(self) -> int:
        """Attention's log-sums and both norms' scales."""
        return 4 * (self._layer.heads + 2) * self.workload.tokens

    @cached_property
    def checkpoint(self) -> int:
        """The layer's input."""
        return self._size(self._layer.hidden)

    @cached_property
    def offloaded(self) -> int:
        """The input, and attention's result, which takes longest to compute again."""
        return self._size(self._layer.hidden + self._layer.queries)

    @cached_property
    def in_layer(self) -> tuple[Moment, ...]:
        """Forward, then backward from the last product to attention."""
        layer = self._layer
        active = layer.inside * (2 if self.workload.dropout else 1) + self._room("down", layer.inside)
        attention = 2 * layer.hidden + 2 * layer.queries + 2 * layer.keys
        if layer.head_norms:
            attention += layer.queries + layer.keys  # the copy that it reads (`fast.heads`)
        workspace = FLASH_WORKSPACE * layer.queries * self.workload.tokens
        grouped = 2 * layer.queries if layer.grouped else 0
        # Where the last layer is checkpointed, its input is among the checkpoints.
        own = self.kept if self.workload.kept_layers else self.kept - self.checkpoint
        return (
            Moment(own + self._size(active + layer.hidden)),  # forward: activation and result
            Moment(own + self._size(layer.inside + layer.hidden)),  # backward through the activation
            Moment(own + self._size((3 + self.workload.dropout) * layer.hidden)),  # through the first products
            # Through attention, with the widest tensors dropped before.
            Moment(own - self._size(layer.hidden + 2 * layer.inside) + self._size(attention + grouped) + workspace),
        )

    @cached_property
    def in_loss(self) -> tuple[Moment, ...]:
        """Result of the last layer and its norm, over which the gradient is written; some tokens' logits."""
        row = max(1, self.workload.facts.vocabulary) * self.workload.compute_bytes
        rows = max(LOGIT_ROWS, LOGIT_BYTES // row // LOGIT_ROWS * LOGIT_ROWS)
        return (Moment(2 * self._size(self._layer.hidden), loss=row * min(rows, self.workload.tokens)),)
