"""SwiGLU with the low-rank updates of its neighbours folded in, so that no tensor as wide as the MLP is read for them.

Forward adds the updates of gate and up; backward adds those again, and the one of down's input gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels
from qlora_trainer.fast.low_rank import Dropout, keeps, product, rank_step


@dataclass(frozen=True, slots=True)
class Update:
    """scale · left [T, R] @ right [R, N], to be added to a [T, N] tensor. R is 0 where there is no adapter."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def plain(self) -> torch.Tensor:
        """The update itself, in float32."""
        return self.scale * (self.left.float() @ self.right.float())


def swiglu(
    gate_up: torch.Tensor, gate: Update, up: Update, out: torch.Tensor, dropout: Dropout | None = None
) -> torch.Tensor:
    """Write silu(gate) · up into `out` [T, I], of which only the last dimension must be dense.

    Returns the same after dropout (without one, `out`). gate_up [T, 2·I] lacks the updates.
    """
    tokens, width = out.shape
    if not uses_kernels(gate_up):
        g, u = gate_up[:, :width].float() + gate.plain(), gate_up[:, width:].float() + up.plain()
        out.copy_(torch.nn.functional.silu(g) * u)
        return out if dropout is None else out * dropout.mask(tokens, width) / (1 - dropout.share)
    also = out if dropout is None else out.new_empty(out.shape)
    _forward[_grid(tokens, width)](
        gate_up, out, also, tokens, width, out.stride(0),
        *_pointers(gate), *_pointers(up), *_numbers(dropout, gate_up), **_ranks(gate, up), DROPOUT=dropout is not None,
    )  # fmt: skip
    return also


def swiglu_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, gate: Update, up: Update, down: Update, dropout: Dropout | None = None
) -> None:
    """Gradients of gate and up over gate_up [T, 2·I], and swiglu's output (after dropout) over grad [T, I].

    grad is the output's gradient without `down`, the update that comes back through down's adapter.
    """
    tokens, width = grad.shape
    if not uses_kernels(gate_up):
        g, u = gate_up[:, :width].float() + gate.plain(), gate_up[:, width:].float() + up.plain()
        keep = 1 if dropout is None else dropout.mask(tokens, width) / (1 - dropout.share)
        dh, sigmoid = grad.float() + down.plain() * keep, torch.sigmoid(g)
        gate_up[:, :width] = dh * u * sigmoid * (1 + g * (1 - sigmoid))
        gate_up[:, width:] = dh * g * sigmoid
        grad.copy_(g * sigmoid * u * keep)
        return
    _backward[_grid(tokens, width)](
        gate_up, grad, tokens, width,
        *_pointers(gate), *_pointers(up), *_pointers(down), *_numbers(dropout, gate_up),
        **_ranks(gate, up), RANK_D=down.left.shape[1], STEP_D=rank_step(down.left.shape[1]),
        DROPOUT=dropout is not None,
    )  # fmt: skip


ROWS, COLUMNS = 64, 64


def _grid(tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(width, COLUMNS), triton.cdiv(tokens, ROWS)


def _pointers(update: Update) -> tuple[object, ...]:
    right = update.right
    return update.left, right, update.scale, update.left.stride(0), right.stride(0), right.stride(1)


def _numbers(dropout: Dropout | None, anything: torch.Tensor) -> tuple[object, ...]:
    if dropout is None:
        return anything, 0, 0, 1.0
    return dropout.seed, dropout.site, dropout.threshold, 1 / (1 - dropout.share)


def _ranks(gate: Update, up: Update) -> dict[str, int]:
    ranks = {"RANK_G": gate.left.shape[1], "RANK_U": up.left.shape[1]}
    return {**ranks, "STEP_G": rank_step(ranks["RANK_G"]), "STEP_U": rank_step(ranks["RANK_U"]),
            "ROWS": ROWS, "COLUMNS": COLUMNS}  # fmt: skip


@triton.jit
def _updated(
    values, left, right, scale, left_row, right_row, right_column, row, column, row_inside, column_inside,
    RANK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    values = values.to(tl.float32)
    if RANK > 0:
        values += scale * product(
            left, right, row, column, row_inside, column_inside, left_row, right_row, right_column,
            RANK, STEP, ROWS, COLUMNS,
        )  # fmt: skip
    return values


@triton.jit(do_not_specialize=["site"])
def _forward(
    gate_up, out, also, rows, width, out_row,
    g_left, g_right, g_scale, g_left_row, g_right_row, g_right_column,
    u_left, u_right, u_scale, u_left_row, u_right_row, u_right_column,
    seed, site, threshold, kept_scale,
    RANK_G: tl.constexpr, RANK_U: tl.constexpr, STEP_G: tl.constexpr, STEP_U: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_inside, column_inside = row < rows, column < width
    inside = row_inside & column_inside
    place = gate_up + row * (2 * width) + column
    gate = _updated(
        tl.load(place, mask=inside, other=0.0), g_left, g_right, g_scale, g_left_row, g_right_row, g_right_column,
        row, column, row_inside, column_inside, RANK_G, STEP_G, ROWS, COLUMNS,
    )  # fmt: skip
    up = _updated(
        tl.load(place + width, mask=inside, other=0.0), u_left, u_right, u_scale, u_left_row, u_right_row,
        u_right_column, row, column, row_inside, column_inside, RANK_U, STEP_U, ROWS, COLUMNS,
    )  # fmt: skip
    values = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_row + column, values.to(out.dtype.element_ty), mask=inside)
    if DROPOUT:
        values = tl.where(keeps(seed, site, row, column, threshold), values * kept_scale, 0.0)
        tl.store(also + row * width + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site"])
def _backward(
    gate_up, grad, rows, width,
    g_left, g_right, g_scale, g_left_row, g_right_row, g_right_column,
    u_left, u_right, u_scale, u_left_row, u_right_row, u_right_column,
    d_left, d_right, d_scale, d_left_row, d_right_row, d_right_column,
    seed, site, threshold, kept_scale,
    RANK_G: tl.constexpr, RANK_U: tl.constexpr, STEP_G: tl.constexpr, STEP_U: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK_D: tl.constexpr, STEP_D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_inside, column_inside = row < rows, column < width
    inside = row_inside & column_inside
    place = gate_up + row * (2 * width) + column
    gate = _updated(
        tl.load(place, mask=inside, other=0.0), g_left, g_right, g_scale, g_left_row, g_right_row, g_right_column,
        row, column, row_inside, column_inside, RANK_G, STEP_G, ROWS, COLUMNS,
    )  # fmt: skip
    up = _updated(
        tl.load(place + width, mask=inside, other=0.0), u_left, u_right, u_scale, u_left_row, u_right_row,
        u_right_column, row, column, row_inside, column_inside, RANK_U, STEP_U, ROWS, COLUMNS,
    )  # fmt: skip
    keep = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    if DROPOUT:
        keep = tl.where(keeps(seed, site, row, column, threshold), kept_scale, 0.0)
    there = grad + row * width + column
    dh = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    if RANK_D > 0:
        dh += keep * d_scale * product(
            d_left, d_right, row, column, row_inside, column_inside, d_left_row, d_right_row, d_right_column,
            RANK_D, STEP_D, ROWS, COLUMNS,
        )  # fmt: skip
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(place, (dh * up * (sigmoid + silu * (1 - sigmoid))).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(place + width, (dh * silu).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(there, (silu * up * keep).to(grad.dtype.element_ty), mask=inside)
