"""Frozen linear layers that share an input, as one; with their LoRA adapters.

q, k and v become one matrix product, gate and up another. The weights are dequantized side by side into a buffer that
all groups share; where memory is free, once and for all. The adapters' float32 weights are copied once a step into the
compute type: the A matrices one below the other, the B matrices as blocks on a diagonal, ranks filled up with zeros to
what tensor cores take.

An adapter's update is part of the wide product: the input has its product with A beside it, the weight has B. So both
are added up in float32, and rounded once. A young adapter's update is smaller than what 16 bit resolve of the frozen
layer's output; added to that once it is rounded, most of it would be lost. (cuBLAS does so too, where a product is to
be added to a matrix: of an update of a thousandth, half arrives on an H100.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_trainer.fast.nf4 import dequantize, supports
from qlora_vram.fast import RANK_STEP, ROW_STEP

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: the frozen module and its adapter's matrices A [r, K] and B [N, r], if it has one."""

    base: Any
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @classmethod
    def of(cls, module: nn.Module) -> Linear | str:
        """Read a module; or say why it can't be run here."""
        if not isinstance(module, LoraLayer):
            reason = _why_not(module)
            return reason or cls(module)
        reason = _why_not(module.base_layer) or _why_not_adapter(module)
        if reason:
            return reason
        a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        dropout = getattr(module.lora_dropout[ADAPTER], "p", 0.0)
        return cls(module.base_layer, a.weight, b.weight, module.scaling[ADAPTER], dropout)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.base.out_features, self.base.in_features

    @property
    def rank(self) -> int:
        """The adapter's rank; 0 without one."""
        return 0 if self.a is None else len(self.a)

    def write(self, out: torch.Tensor) -> None:
        """Write the frozen weight [N, K] into `out`."""
        weight = self.base.weight
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            dequantize(weight.data, weight.quant_state, out)
        else:
            out.copy_(weight)


def _why_not(base: Any) -> str | None:
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        state = base.weight.quant_state
        return None if state is not None and supports(state) else "a 4-bit weight isn't made of whole blocks"
    if type(base) is nn.Linear:
        return None
    return f"{type(base).__name__} is no linear layer that it knows"


def _why_not_adapter(module: Any) -> str | None:
    plain = (
        list(module.active_adapters) == [ADAPTER]
        and not module.merged
        and not module.lora_variant
        and not module.lora_embedding_A
        and module.lora_A[ADAPTER].bias is None
        and module.lora_B[ADAPTER].bias is None
    )
    return None if plain else "the adapter is more than plain LoRA"


class Group:
    """Linears with one input, as one linear layer with outputs N = ΣNᵢ and one adapter of rank R = Σrᵢ (filled up)."""

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype) -> None:
        self.linears = tuple(linears)
        weight = linears[0].base.weight
        self.inputs = linears[0].shape[1]
        self.outputs = sum(linear.shape[0] for linear in linears)
        self.scale = next((linear.scale for linear in linears if linear.rank), 1.0)
        self.dropout = next((linear.dropout for linear in linears if linear.rank), 0.0)
        self.ranks = [-(-linear.rank // RANK_STEP) * RANK_STEP for linear in linears]
        self.rank = sum(self.ranks)
        self.a = torch.zeros(self.rank, self.inputs, dtype=dtype, device=weight.device)
        self.b = torch.zeros(self.outputs, self.rank, dtype=dtype, device=weight.device)
        self.bias = self._joined_bias(dtype)
        self._held: torch.Tensor | None = None
        self.parameters: list[nn.Parameter] = [
            part for linear in linears for part in (linear.a, linear.b) if part is not None
        ]

    @property
    def row(self) -> int:
        """Numbers from one row of an operand with room beside it to the next."""
        return -(-(self.inputs + self.rank) // ROW_STEP) * ROW_STEP if self.rank else self.inputs

    @property
    def copies(self) -> list[torch.Tensor]:
        """Where the parameters go in `a` and `b`: views, in the order of `parameters`."""
        views = []
        for linear, row, column in self._places():
            views.append(self.a[column : column + linear.rank])
            views.append(self.b[row : row + linear.shape[0], column : column + linear.rank])
        return views

    def ranks_at(self, output: int) -> slice:
        """The ranks that reach an output: those of the linear layer that it is one of."""
        row = column = 0
        for linear, rank in zip(self.linears, self.ranks, strict=True):
            row, column = row + linear.shape[0], column + rank
            if output < row:
                return slice(column - rank, column)
        raise IndexError(f"there is no output {output}")

    def weight(self, buffer: torch.Tensor) -> torch.Tensor:
        """The frozen weight [N, K], in the buffer where it isn't held: valid until another group's is asked for."""
        if self._held is not None:
            return self._held[:, : self.inputs]
        if len(self.linears) == 1 and self.linears[0].base.weight.dtype == buffer.dtype:
            return self.linears[0].base.weight.data  # type: ignore[no-any-return]
        return self._write(buffer[: self.outputs * self.inputs].view(self.outputs, self.inputs))

    def hold(self, *, roomy: bool) -> None:
        """Keep the frozen weight in the compute type from here on; `roomy`: with the room that B takes in products.

        Raises torch.OutOfMemoryError.
        """
        self._held = self.a.new_empty(self.outputs, self.row if roomy else self.inputs)
        self._write(self._held[:, : self.inputs])

    def with_room(self, like: torch.Tensor) -> torch.Tensor:
        """An input [T, K] with room for its product with A at its right [T, K + R]: not filled. T is that of `like`."""
        return like.new_empty(len(like), self.row)[:, : self.inputs + self.rank]

    def given_room(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of x [T, K] with that room; x itself where there is no adapter."""
        if not self.rank:
            return x
        roomy = self.with_room(x)
        roomy[:, : self.inputs] = x
        return roomy

    def product(self, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """x [T, K] times the frozen weight, and the bias; with x times A at its right [T, K + R], the adapter's too."""
        weight = (self.weight(buffer) if x.shape[1] == self.inputs else self._weight_and_b(buffer)).T
        return x @ weight if self.bias is None else torch.addmm(self.bias, x, weight)

    def gradients(self, da: torch.Tensor | None, db: torch.Tensor | None) -> list[torch.Tensor]:
        """Gradients of `parameters` from those of `a` and `b`."""
        if da is None or db is None:
            return []
        found = []
        for linear, row, column in self._places():
            found.append(da[column : column + linear.rank])
            found.append(db[row : row + linear.shape[0], column : column + linear.rank])
        return found

    def _weight_and_b(self, buffer: torch.Tensor) -> torch.Tensor:
        """The frozen weight and, at its right, B times the adapter's scale [N, K + R]: held, or in the buffer."""
        whole = self._held
        if whole is None:
            whole = buffer[: self.outputs * self.row].view(self.outputs, self.row)
            self._write(whole[:, : self.inputs])
        whole = whole[:, : self.inputs + self.rank]
        torch.mul(self.b, self.scale, out=whole[:, self.inputs :])
        return whole

    def _write(self, whole: torch.Tensor) -> torch.Tensor:
        row = 0
        for linear in self.linears:
            linear.write(whole[row : row + linear.shape[0]])
            row += linear.shape[0]
        return whole

    def _places(self) -> list[tuple[Linear, int, int]]:
        places, row, column = [], 0, 0
        for linear, rank in zip(self.linears, self.ranks, strict=True):
            if linear.rank:
                places.append((linear, row, column))
            row, column = row + linear.shape[0], column + rank
        return places

    def _joined_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        biases = [linear.base.bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        parts = [
            bias.detach().to(dtype) if bias is not None else self.b.new_zeros(linear.shape[0])
            for bias, linear in zip(biases, self.linears, strict=True)
        ]
        return torch.cat(parts)


def wide_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, rounded to float32 only: for gradients of float32 weights."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
