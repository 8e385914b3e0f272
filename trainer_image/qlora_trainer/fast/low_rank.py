"""Products of low rank that are added on the fly: inside the kernel that reads or writes the wide tensor anyway.

At rank 16 such a product is nothing beside reading and writing the wide tensor, which is what a matrix product of its
own would do. Dropout is a hash of (seed, site, row, column): the backward pass draws the same mask without storing it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels


@dataclass(frozen=True, slots=True)
class Dropout:
    """A dropout mask over a [T, N] tensor, as numbers: which share, and what it is drawn from."""

    share: float
    seed: torch.Tensor
    """One int64 on the device, new for each micro step."""
    site: int
    """Which of the model's dropouts this is."""

    @property
    def threshold(self) -> int:
        """Hashes from here on are kept."""
        return min(2**32 - 1, round(self.share * 2**32))

    def mask(self, rows: int, columns: int) -> torch.Tensor:
        """Plain torch: which elements are kept, boolean [rows, columns]."""
        device = self.seed.device
        row = torch.arange(rows, device=device)[:, None]
        column = torch.arange(columns, device=device)[None, :]
        key = _plain_mix((self.seed + self.site * 0x9E3779B1) & 0xFFFFFFFF)
        return _plain_mix(_plain_mix((row + key) & 0xFFFFFFFF) ^ column) >= self.threshold


def _plain_mix(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rank_step(rank: int) -> int:
    """How much of a rank a kernel takes at once: the largest power of two up to 64 that divides it (0: nothing)."""
    return min(64, rank & -rank)


def dropped(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """x [T, N] with some elements zero and the others scaled up; x itself without dropout."""
    if dropout is None:
        return x
    if not uses_kernels(x):
        return x * dropout.mask(*x.shape) / (1 - dropout.share)
    out = x.new_empty(x.shape)
    block = 1024
    _drop[(len(x), triton.cdiv(x.shape[1], block))](
        x, out, x.shape[1], x.stride(0), dropout.seed, dropout.site, dropout.threshold, 1 / (1 - dropout.share),
        BLOCK=block,
    )  # fmt: skip
    return out


def add_product(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, dropout: Dropout | None = None
) -> None:
    """Add scale · dropout(left [T, R] @ right [R, N]) to out [T, N] in place."""
    if dropout is None:
        out.addmm_(left, right, alpha=scale)
    elif not uses_kernels(out):
        out.add_((left @ right) * dropout.mask(*out.shape), alpha=scale / (1 - dropout.share))
    else:
        rows, columns = out.shape
        _add_product[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
            out, left, right, rows, columns, scale / (1 - dropout.share), dropout.seed, dropout.site,
            dropout.threshold, out.stride(0), left.stride(0), right.stride(0), right.stride(1),
            RANK=left.shape[1], STEP=rank_step(left.shape[1]), ROWS=64, COLUMNS=128,
        )  # fmt: skip


@triton.jit
def mix(x):
    """murmur3's finalizer: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keeps(seed, site, row, column, threshold):
    """Whether elements (row [M, 1], column [1, N]) are kept."""
    key = mix((tl.load(seed) + site.to(tl.int64) * 0x9E3779B1).to(tl.uint32))
    return mix(mix(row.to(tl.uint32) + key) ^ column.to(tl.uint32)).to(tl.int64) >= threshold


@triton.jit
def product(
    left, right, row, column, row_inside, column_inside, left_row, right_row, right_column,
    RANK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of left [T, RANK] @ right [RANK, N] in float32; row [M, 1] and column [1, N] say which."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, RANK, STEP):
        rank = start + tl.arange(0, STEP)
        one = tl.load(left + row * left_row + rank[None, :], mask=row_inside, other=0.0)
        two = tl.load(right + rank[:, None] * right_row + column * right_column, mask=column_inside, other=0.0)
        total = tl.dot(one, two, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["site"])
def _drop(x, out, width, x_row, seed, site, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32) * scale
    values = tl.where(keeps(seed, site, row, column, threshold), values, 0.0)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site"])
def _add_product(
    out, left, right, rows, columns, scale, seed, site, threshold, out_row, left_row, right_row, right_column,
    RANK: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_inside, column_inside = row < rows, column < columns
    values = product(
        left, right, row, column, row_inside, column_inside, left_row, right_row, right_column,
        RANK, STEP, ROWS, COLUMNS,
    )  # fmt: skip
    values = tl.where(keeps(seed, site, row, column, threshold), values * scale, 0.0)
    place = out + row * out_row + column
    inside = row_inside & column_inside
    values += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)
