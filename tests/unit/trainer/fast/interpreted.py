"""Every Triton kernel under Triton's interpreter beside its plain equivalent: prints the errors by norm as JSON.

A process of its own, since the interpreter is chosen (TRITON_INTERPRET=1) when the kernels are imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch

from qlora_trainer.fast import cross_entropy, dispatch, head_norm, low_rank, nf4, norm, rope, swiglu
from qlora_trainer.fast.low_rank import Dropout
from qlora_trainer.fast.swiglu import Update
from qlora_trainer.formats import IGNORED

Piece = Callable[[], tuple[torch.Tensor, ...]]


def error(piece: Piece) -> float:
    """Largest error of any result."""
    dispatch.INTERPRETED = False
    expected = piece()
    dispatch.INTERPRETED = True
    found = piece()
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))


def dequantized(**options: Any) -> Piece:
    outputs, inputs = 48, 128
    weight = torch.randn(outputs, inputs)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, **{"quant_type": "nf4", "compress_statistics": True, **options}
    )

    def piece() -> tuple[torch.Tensor, ...]:
        out, apart = torch.full((outputs, inputs), float("nan")), torch.zeros(outputs, inputs + 16)
        nf4.dequantize(packed, state, out)
        nf4.dequantize(packed, state, apart[:, :inputs])
        return out, apart

    return piece


def dequantized_across_rows() -> Piece:
    """bitsandbytes gets such a weight wrong on a CPU (0.50.2), so the plain one has a block in each row."""
    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(96, 64), quant_type="nf4")

    def piece() -> tuple[torch.Tensor, ...]:
        out = torch.zeros(64, 112)[:, :96] if dispatch.INTERPRETED else torch.zeros(96, 64)
        nf4.dequantize(packed, state, out)
        return (out.reshape(64, 96),)

    return piece


def normed() -> Piece:
    x, weight, dy, add = torch.randn(7, 48), torch.randn(48), torch.randn(7, 48), torch.randn(7, 48)

    def piece() -> tuple[torch.Tensor, ...]:
        stream = x.clone()
        y, rstd = norm.rms_norm(stream, weight, 1e-5, add=add)
        alone, rstd_alone = norm.rms_norm(x, weight, 1e-5)
        apart = torch.zeros(7, 64)
        norm.rms_norm(x, weight, 1e-5, out=apart[:, :48])
        added = norm.rms_norm_backward(dy.clone(), x, weight, rstd_alone, add=add)
        scaled = norm.rms_norm_backward(dy.clone(), x, weight, rstd_alone, scale=torch.tensor(2.5))
        return stream, y, rstd, alone, apart, added, scaled

    return piece


def rotated() -> Piece:
    qkv, cos, sin = torch.randn(5, 10 * 16), torch.rand(5, 8), torch.rand(5, 8)

    def piece() -> tuple[torch.Tensor, ...]:
        whole = qkv.clone()
        heads = whole[:, : 9 * 16].view(5, 9, 16)
        rope.rotate(heads, cos, sin, heads)
        back, some = torch.empty(5, 9, 16), torch.empty(5, 9, 16)
        rope.rotate(heads, cos, sin, back, back=True)
        rope.rotate(heads, cos[:, :6].contiguous(), sin[:, :6].contiguous(), some)
        return whole, back, some

    return piece


def heads_normed() -> Piece:
    """Of 12 heads, more than a program handles, with and beside others; sizes are no powers of two."""
    product, weight, grad = torch.randn(5, 14 * 24), torch.randn(12, 24), torch.randn(12, 5, 24).transpose(0, 1)
    cos, sin = torch.rand(5, 12), torch.rand(5, 12)

    def piece() -> tuple[torch.Tensor, ...]:
        whole, out = product.clone(), torch.zeros(5, 13, 24)
        heads = whole.view(5, 14, 24)[:, :12]
        head_norm.norm_and_rotate(heads, weight, cos, sin, 1e-5, out[:, :12])
        head_norm.norm_and_rotate_backward(grad, heads, weight, cos, sin, 1e-5)
        return out, whole

    return piece


DROPOUT = Dropout(0.25, torch.tensor([1_234_567_891]), 3)


def dropped() -> Piece:
    return lambda: (low_rank.dropped(torch.ones(70, 1200)[:, :1100], DROPOUT),)


def product_added() -> Piece:
    left, right = torch.randn(70, 48), torch.randn(48, 200)

    def piece() -> tuple[torch.Tensor, ...]:
        out = torch.ones(70, 200)
        low_rank.add_product(out, left, right, 1.5, DROPOUT)
        return (out,)

    return piece


def activated(*, adapters: bool, dropout: Dropout | None) -> Piece:
    gate_up = torch.randn(70, 2 * 130)
    none = Update(torch.randn(70, 0), torch.randn(0, 130), 1.0)
    some = [Update(torch.randn(70, 32)[:, :16], torch.randn(130, 16).T, scale) for scale in (0.5, 0.7, 1.0)]
    gate, up, down = some if adapters else (none, some[1], none)

    def piece() -> tuple[torch.Tensor, ...]:
        out = torch.zeros(70, 150)
        also = swiglu.swiglu(gate_up, gate, up, out[:, :130], dropout)
        into, grad = gate_up.clone(), torch.full((70, 130), 0.3)
        swiglu.swiglu_backward(into, grad, gate, up, down, dropout)
        return out, also, into, grad

    return piece


def lost() -> Piece:
    logits, labels = torch.randn(6, 5000) * 3, torch.tensor([0, 4999, IGNORED, 17, 4096, 4095])

    def piece() -> tuple[torch.Tensor, ...]:
        grad, losses = logits.clone(), torch.empty(6)
        cross_entropy.cross_entropy_(grad, labels, losses)
        return losses, grad

    return piece


PIECES = {
    "nf4": dequantized,
    "nf4 without double quantization": lambda: dequantized(compress_statistics=False),
    "nf4 whose blocks go on in the next row": dequantized_across_rows,
    "fp4": lambda: dequantized(quant_type="fp4"),
    "norm": normed,
    "rope": rotated,
    "norm of heads": heads_normed,
    "dropout": dropped,
    "low-rank product": product_added,
    "swiglu": lambda: activated(adapters=True, dropout=None),
    "swiglu with dropout": lambda: activated(adapters=True, dropout=DROPOUT),
    "swiglu with one adapter": lambda: activated(adapters=False, dropout=None),
    "cross-entropy": lost,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: error(make()) for name, make in PIECES.items()}))
