"""Dequantization of bitsandbytes' 4-bit weights into a buffer that exists already.

bitsandbytes launches three kernels where the quantization constants are quantized too, and allocates twice. This is one
launch, bound by memory: it reads half a byte and writes two for each weight.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional
import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels

BLOCKS = 32
"""Quantization blocks a program handles."""


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """Write the weights of a Linear4bit into `out` [N, K], of any floating-point type; its rows may lie apart."""
    outputs, inputs = out.shape
    if not uses_kernels(packed):
        out.copy_(bitsandbytes.functional.dequantize_4bit(packed, state))
        return
    if not out.is_contiguous() and inputs % state.blocksize:  # a block goes on in the next row
        whole = out.new_empty(out.shape)
        dequantize(packed, state, whole)
        out.copy_(whole)
        return
    blocks = outputs * inputs // state.blocksize
    nested = state.state2
    _dequantize[(triton.cdiv(blocks, BLOCKS),)](
        packed,
        state.absmax,
        state.code,
        nested.code if nested else state.code,
        nested.absmax if nested else state.absmax,
        state.offset if nested else state.absmax,
        out,
        blocks,
        out.stride(0),
        NESTED=nested is not None,
        NESTED_SIZE=nested.blocksize if nested else 1,
        SIZE=state.blocksize,
        BLOCKS=BLOCKS,
        IN_ROW=0 if out.is_contiguous() else inputs // state.blocksize,
    )


def supports(state: Any) -> bool:
    """Whether whole blocks make up the weight, as they do for every linear layer of a real model."""
    return bool(state.shape.numel() % state.blocksize == 0)


@triton.jit
def _dequantize(
    packed, absmax, code, absmax_code, absmax_scale, offset, out, blocks, out_row,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    IN_ROW: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    if NESTED:
        index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_code + index) * tl.load(absmax_scale + block // NESTED_SIZE, mask=inside, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    start = block.to(tl.int64)[:, None] * SIZE
    pair = tl.load(packed + start // 2 + tl.arange(0, SIZE // 2)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    first = tl.load(code + (pair >> 4)) * scale[:, None]
    second = tl.load(code + (pair & 15)) * scale[:, None]
    values = tl.reshape(tl.join(first, second), (BLOCKS, SIZE))
    if IN_ROW > 0:  # blocks of a row, whose rows lie apart
        start = (block // IN_ROW).to(tl.int64)[:, None] * out_row + (block % IN_ROW)[:, None] * SIZE
    tl.store(out + start + tl.arange(0, SIZE)[None, :], values.to(out.dtype.element_ty), mask=inside[:, None])
