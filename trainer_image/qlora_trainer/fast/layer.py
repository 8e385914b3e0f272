"""One decoder layer of the Llama shape as a single step of autograd, with its backward pass written out.

Written out, the layer decides what it keeps (its norms are computed again in any case), a checkpointed layer computes
again only what its gradients need (never the MLP's last product, a quarter of the layer), and no gradient is added up
in a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_trainer.fast.attention import Attended, Layout, attend, attend_backward
from qlora_trainer.fast.heads import Heads
from qlora_trainer.fast.linears import Group, wide_mm
from qlora_trainer.fast.low_rank import Dropout, add_product, dropped
from qlora_trainer.fast.norm import rms_norm, rms_norm_backward
from qlora_trainer.fast.offload import Garage, Parked
from qlora_trainer.fast.swiglu import Update, swiglu, swiglu_backward


@dataclass(frozen=True, slots=True)
class Batch:
    """What all layers of one forward pass share. T tokens in one line."""

    layout: Layout
    cos: torch.Tensor
    """Of the rotary embedding of R numbers of each head [T, R/2], float32."""
    sin: torch.Tensor
    """[T, R/2], float32."""
    seed: torch.Tensor
    """Of the dropout masks: one int64."""
    buffer: torch.Tensor
    """Flat; each weight is dequantized into it."""
    garage: Garage | None = None
    """Where checkpoints wait; None leaves them on the device."""


@dataclass(slots=True)
class Kept:
    """What a layer's backward pass needs. Widths: H hidden, I inside the MLP."""

    x: torch.Tensor
    """The layer's input [T, H]."""
    qkv: torch.Tensor
    """What `Heads` keeps of the product [T, (query heads + 2 · key heads) · D]."""
    attended: Attended
    """[T, query heads · D] and a float32 a head."""
    middle: torch.Tensor
    """The residual stream between attention and MLP [T, H]."""
    gate_up: torch.Tensor
    """Without the adapters' updates [T, 2 · I]."""
    low: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Inputs times A, of qkv, o and gate_up."""
    low_down: torch.Tensor | None = None
    """Likewise of down; computed again where it isn't there."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: x + attention(norm(x)), then + mlp(norm(·))."""

    number: int
    heads: Heads
    eps: float
    input_norm: torch.Tensor
    middle_norm: torch.Tensor
    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    checkpointed: bool

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of their gradients."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def buffer_size(self) -> int:
        """Numbers that the largest weight takes, each as a product wants it."""
        gate_up = self.gate_up.outputs * self.gate_up.inputs  # whose updates are added later, by the activation
        return max(gate_up, *(group.outputs * group.row for group in (self.qkv, self.out, self.down)))

    def hold_weights(self) -> None:
        """Keep all weights in the compute type from here on. Raises torch.OutOfMemoryError."""
        for group in self.groups:
            group.hold(roomy=group is not self.gate_up)

    @property
    def parameters(self) -> list[Any]:
        """The adapters' parameters."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run the layer on x [T, H]."""
        return _Run.apply(x, self, batch, *self.parameters)  # type: ignore[no-any-return, no-untyped-call]

    def keep(self, x: torch.Tensor, batch: Batch, attended: Attended | None = None) -> Kept:
        """The forward pass up to the MLP's activation. `attended` is the attention's result where it is known."""
        roomy = self.qkv.with_room(x)
        rms_norm(x, self.input_norm, self.eps, out=roomy[:, : self.qkv.inputs])
        qkv, low_qkv = self._linear(self.qkv, roomy, batch, 0)
        self.heads.settle(qkv, batch.cos, batch.sin)
        attended = attended or attend(*self.heads.read(qkv, batch.cos, batch.sin), batch.layout)
        middle, low_out = self._linear(self.out, self.out.given_room(attended.out.flatten(1)), batch, 1)
        normed, _ = rms_norm(middle, self.middle_norm, self.eps, add=x)
        gate_up = self.gate_up.product(normed, batch.buffer)
        low_gate_up = dropped(normed, self._dropout(self.gate_up, batch, 2)) @ self.gate_up.a.T
        return Kept(x, qkv, attended, middle, gate_up, (low_qkv, low_out, low_gate_up))

    def finish(self, kept: Kept, batch: Batch) -> torch.Tensor:
        """The rest: the activation, the last product, the residual."""
        down, roomy = self.down, self.down.with_room(kept.x)
        active = roomy[:, : down.inputs]
        dropped_active = swiglu(kept.gate_up, *self._updates(kept), active, self._dropout(down, batch, 3))
        if down.rank:
            kept.low_down = dropped_active @ down.a.T
            roomy[:, down.inputs :] = kept.low_down
        return down.product(roomy, batch.buffer).add_(kept.middle)

    def backward(
        self, grad: torch.Tensor, kept: Kept, batch: Batch, *, to_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of the input (None unless asked for) and of the parameters. Overwrites and drops what was kept."""
        middle_grad, mlp = self._backward_mlp(grad, kept, batch)
        del kept.gate_up, kept.middle  # the widest there are, and the attention's turn needs room
        input_grad, attention = self._backward_attention(middle_grad, kept, batch, to_input=to_input)
        return input_grad, [*attention, *mlp]

    def _backward_mlp(self, grad: torch.Tensor, kept: Kept, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        down, dropout = self.down, self._dropout(self.down, batch, 3)
        active = grad @ down.weight(batch.buffer)
        low_grad = (grad @ down.b).mul_(down.scale)
        swiglu_backward(kept.gate_up, active, *self._updates(kept), Update(low_grad, down.a, 1.0), dropout)
        low = kept.low_down if kept.low_down is not None or not down.rank else active @ down.a.T
        down_grads = _adapter_gradients(down, grad, low, low_grad, active)
        del active
        normed, rstd = rms_norm(kept.middle, self.middle_norm, self.eps)
        into, grads = self._backward_linear(self.gate_up, kept.gate_up, kept.low[2], normed, batch, 2)
        return rms_norm_backward(into, kept.middle, self.middle_norm, rstd, add=grad), [*grads, *down_grads]

    def _backward_attention(
        self, grad: torch.Tensor, kept: Kept, batch: Batch, *, to_input: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        attended = kept.attended.out
        into, out_grads = self._backward_linear(self.out, grad, kept.low[1], attended.flatten(1), batch, 1)
        read = self.heads.read(kept.qkv, batch.cos, batch.sin)
        grads = attend_backward(into.view_as(attended), *read, kept.attended, batch.layout)
        del read, into
        self.heads.backward(grads, kept.qkv, batch.cos, batch.sin)
        del grads
        normed, rstd = rms_norm(kept.x, self.input_norm, self.eps)
        into, qkv_grads = self._backward_linear(self.qkv, kept.qkv, kept.low[0], normed, batch, 0, to_input=to_input)
        if to_input:
            return rms_norm_backward(into, kept.x, self.input_norm, rstd, add=grad), [*qkv_grads, *out_grads]
        return None, [*qkv_grads, *out_grads]

    def _linear(self, group: Group, roomy: torch.Tensor, batch: Batch, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Product, bias and adapter of an input with room beside it; and the input times A, which goes there."""
        low = dropped(roomy[:, : group.inputs], self._dropout(group, batch, site)) @ group.a.T
        roomy[:, group.inputs :] = low
        return group.product(roomy, batch.buffer), low

    def _backward_linear(
        self, group: Group, grad: torch.Tensor, low: torch.Tensor, x: torch.Tensor, batch: Batch, site: int,
        *, to_input: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        """Gradients of the input x and of the parameters. Without `to_input`, the former is anything."""
        dropout = self._dropout(group, batch, site)
        low_grad = (grad @ group.b).mul_(group.scale)
        grads = _adapter_gradients(group, grad, low, low_grad, dropped(x, dropout))
        if not to_input:
            return grad, grads
        into = grad @ group.weight(batch.buffer)
        if group.rank:
            add_product(into, low_grad, group.a, 1.0, dropout)
        return into, grads

    def _dropout(self, group: Group, batch: Batch, site: int) -> Dropout | None:
        return Dropout(group.dropout, batch.seed, 4 * self.number + site) if group.dropout and group.rank else None

    def _updates(self, kept: Kept) -> tuple[Update, Update]:
        """Of gate and up, whether they are two linear layers or one."""
        group, width = self.gate_up, self.down.inputs
        updates = []
        for first in (0, width):
            ranks = group.ranks_at(first)
            updates.append(Update(kept.low[2][:, ranks], group.b[first : first + width, ranks].T, group.scale))
        return updates[0], updates[1]


def _adapter_gradients(
    group: Group, grad: torch.Tensor, low: torch.Tensor | None, low_grad: torch.Tensor, x: torch.Tensor
) -> list[torch.Tensor]:
    """From the gradients of the output and of x·A, x·A itself, and x (after dropout)."""
    if not group.rank or low is None:
        return []
    return group.gradients(wide_mm(low_grad.T, x), wide_mm(grad.T, low).mul_(group.scale))


LONG = 8192
"""Tokens of a document from which computing its attention again costs more than keeping the result in host memory."""


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What a checkpointed layer keeps: its input; in host memory the attention's result too, for long documents."""

    x: Any
    """[T, H], or Parked."""
    attended: tuple[Parked, tuple[Any, ...]] | None = None

    @classmethod
    def of(cls, kept: Kept, batch: Batch) -> _Checkpoint:
        garage = batch.garage
        if garage is None:
            return cls(kept.x)
        x = garage.store(kept.x)
        if batch.layout.longest_of(len(kept.x)) < LONG:
            return cls(x)
        return cls(x, (garage.store(kept.attended.out), kept.attended.statistics))

    def restore(self, layer: Layer, batch: Batch) -> Kept:
        """The forward pass again."""
        garage = batch.garage
        if garage is None:
            return layer.keep(self.x, batch)
        attended = Attended(garage.take(self.attended[0]), self.attended[1]) if self.attended else None
        return layer.keep(garage.take(self.x), batch, attended)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, batch: Batch, *parameters: Any) -> torch.Tensor:
        kept = layer.keep(x, batch)
        out = layer.finish(kept, batch)
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.batch = layer, batch
            ctx.kept = _Checkpoint.of(kept, batch) if layer.checkpointed else kept
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        layer, batch = ctx.layer, ctx.batch
        kept = ctx.kept if isinstance(ctx.kept, Kept) else ctx.kept.restore(layer, batch)
        ctx.kept = None  # overwritten below, and a second backward pass must not find it
        to_input, parameters = layer.backward(grads[0], kept, batch, to_input=ctx.needs_input_grad[0])
        return to_input, None, None, *parameters
