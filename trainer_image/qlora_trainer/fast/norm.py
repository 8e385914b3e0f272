"""RMSNorm with a frozen weight, forward and backward, each with the residual stream's addition in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, add: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows of x [T, H], and 1/rms of each in float32 [T]. `add` [T, H] is added to x in place first.

    The rows are written into `out` [T, H] where it is given; only its last dimension must be dense.
    """
    y = torch.empty_like(x) if out is None else out
    if not uses_kernels(x):
        if add is not None:
            x.add_(add)
        rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
        return y.copy_(weight * (x.float() * rstd[:, None]).to(x.dtype)), rstd
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _forward[(len(x),)](
        x, x if add is None else add, weight, y, rstd, width, y.stride(0), eps,
        ADD=add is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x, written over dy [T, H]. dy is multiplied by the scalar `scale`, `add` [T, H] is added."""
    if not uses_kernels(x):
        hat = x.float() * rstd[:, None]
        grad = dy.float() * weight.float() * (1 if scale is None else scale)
        dx = rstd[:, None] * (grad - hat * (grad * hat).mean(-1, keepdim=True))
        return dy.copy_(dx if add is None else dx + add)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _backward[(len(x),)](
        dy, x, weight, rstd, x if add is None else add, rstd if scale is None else scale, width,
        ADD=add is not None, SCALE=scale is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dy


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@triton.jit
def _forward(x, add, weight, y, rstd, width, y_row, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    values = tl.load(x + place, mask=inside, other=0.0)
    if ADD:
        values = (values.to(tl.float32) + tl.load(add + place, mask=inside, other=0.0).to(tl.float32)).to(values.dtype)
        tl.store(x + place, values, mask=inside)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd + row, inverse)
    hat = (wide * inverse).to(values.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + column, (hat * factor).to(values.dtype), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, rstd, add, scale, width, ADD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    inverse = tl.load(rstd + row)
    hat = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * inverse
    grad = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        grad *= tl.load(scale)
    dx = inverse * (grad - hat * (tl.sum(grad * hat, 0) / width))
    if ADD:
        dx += tl.load(add + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dy + place, dx.to(dy.dtype.element_ty), mask=inside)
