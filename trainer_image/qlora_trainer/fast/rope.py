"""Rotary position embedding in the half-split layout of all Llama-shaped models, from any strides to any strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels


def rotate(
    source: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *, back: bool = False
) -> None:
    """Rotate heads [T, heads, D] into `out` of the same shape; `back` undoes it, which is also its gradient.

    cos and sin: [T, R/2], float32. The first R ≤ D numbers of each head are rotated, the others stay what they are.
    source and out may be the same tensor, and need only their last dimension dense.
    """
    half = cos.shape[1]
    if 2 * half < source.shape[2]:
        if out is not source:
            out[..., 2 * half :] = source[..., 2 * half :]
        source, out = source[..., : 2 * half], out[..., : 2 * half]
    tokens, heads, _ = source.shape
    if not uses_kernels(source):
        one, two = source[..., :half].float(), source[..., half:].float()
        c, s = cos[:, None], -sin[:, None] if back else sin[:, None]
        out.copy_(torch.cat([one * c - two * s, two * c + one * s], -1))
        return
    _rotate[(tokens, triton.cdiv(heads, 8))](
        source, cos, sin, out, heads, half,
        source.stride(0), source.stride(1), out.stride(0), out.stride(1),
        BACK=back, HEADS=8, HALF=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(
    source, cos, sin, out, heads, half, source_token, source_head, out_token, out_head,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
    s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
    if BACK:
        s = -s
    place = source + token * source_token + head * source_head + column
    one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    place = out + token * out_token + head * out_head + column
    tl.store(place, (one * c - two * s).to(out.dtype.element_ty), mask=inside)
    tl.store(place + half, (two * c + one * s).to(out.dtype.element_ty), mask=inside)
