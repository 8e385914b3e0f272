"""RMSNorm of each head of q and k (Qwen3) and the rotary embedding behind it, in one pass; and back through both.

Going back starts from what came before the norm: from the rotated heads it can't be had where a weight is zero, nor
where it is small beside what 16 bit resolve. 1/rms is computed again, from numbers that are read anyway. All of it is
float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels
from qlora_trainer.fast.rope import rotate

HEADS = 8
"""Heads a program handles."""


def norm_and_rotate(
    source: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """Write heads [T, heads, D], each normed by its weight [heads, D] and then rotated, into `out` of the same shape.

    cos and sin: [T, D/2], float32. Both tensors need only their last dimension dense.
    """
    if not uses_kernels(source):
        wide = source.float()
        normed = wide * _inverse_rms(wide, eps) * weight.float()
        rotate(normed, cos, sin, out)
        return
    _forward[_grid(source)](
        source, weight, cos, sin, out, *source.shape[1:], eps, *source.stride()[:2], *out.stride()[:2],
        **_blocks(source), num_warps=4,
    )  # fmt: skip


def norm_and_rotate_backward(
    grad: torch.Tensor, source: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> None:
    """The gradient of source [T, heads, D], written over it, from the one of what norm_and_rotate made of it."""
    if not uses_kernels(source):
        wide = source.float()
        inverse = _inverse_rms(wide, eps)
        hat, normed_grad = wide * inverse, torch.empty_like(wide)
        rotate(grad, cos, sin, normed_grad, back=True)
        hat_grad = normed_grad * weight.float()
        source.copy_(inverse * (hat_grad - hat * (hat_grad * hat).mean(-1, keepdim=True)))
        return
    _backward[_grid(source)](
        grad, source, weight, cos, sin, *source.shape[1:], eps, *grad.stride()[:2], *source.stride()[:2],
        **_blocks(source), num_warps=4,
    )  # fmt: skip


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _grid(heads: torch.Tensor) -> tuple[int, int]:
    return len(heads), triton.cdiv(heads.shape[1], HEADS)


def _blocks(heads: torch.Tensor) -> dict[str, int]:
    return {"HEADS": HEADS, "HALF": triton.next_power_of_2(heads.shape[2] // 2)}


@triton.jit
def _halves(start, row, column, half, row_stride, inside):
    """Both halves of some heads in float32, each [HEADS, HALF]."""
    place = start + row * row_stride + column
    one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    return one, two


@triton.jit
def _forward(
    source, weight, cos, sin, out, heads, size, eps, source_token, source_head, out_token, out_head,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    half = size // 2
    inside = (head < heads) & (column < half)
    c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
    one, two = _halves(source + token * source_token, head, column, half, source_head, inside)
    w_one, w_two = _halves(weight, head, column, half, size, inside)
    inverse = tl.rsqrt(tl.sum(one * one + two * two, 1) / size + eps)[:, None]
    one, two = one * inverse * w_one, two * inverse * w_two
    place = out + token * out_token + head * out_head + column
    tl.store(place, (one * c - two * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + half, (two * c + one * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, source, weight, cos, sin, heads, size, eps, grad_token, grad_head, source_token, source_head,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    half = size // 2
    inside = (head < heads) & (column < half)
    c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
    one, two = _halves(source + token * source_token, head, column, half, source_head, inside)
    w_one, w_two = _halves(weight, head, column, half, size, inside)
    g_one, g_two = _halves(grad + token * grad_token, head, column, half, grad_head, inside)
    inverse = tl.rsqrt(tl.sum(one * one + two * two, 1) / size + eps)[:, None]
    one, two = one * inverse, two * inverse
    g_one, g_two = (g_one * c + g_two * s) * w_one, (g_two * c - g_one * s) * w_two
    mean = (tl.sum(g_one * one + g_two * two, 1) / size)[:, None]
    place = source + token * source_token + head * source_head + column
    tl.store(place, (inverse * (g_one - one * mean)).to(source.dtype.element_ty), mask=inside)
    tl.store(place + half, (inverse * (g_two - two * mean)).to(source.dtype.element_ty), mask=inside)
