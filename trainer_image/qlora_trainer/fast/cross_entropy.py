"""The output head and its cross-entropy, a few rows at a time: the logits of a whole batch are never there.

Gradients are computed on the way forward, as Liger does, but in larger chunks: each chunk reads the head's weight
twice. They are those of the summed loss, so that float16 holds them; the mean's factor comes in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qlora_trainer.fast.dispatch import uses_kernels
from qlora_trainer.fast.norm import rms_norm, rms_norm_backward
from qlora_trainer.formats import IGNORED

CHUNK_BYTES = 256 * 2**20
"""Logits that exist at once, in bytes."""


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """Rows whose logits are computed together."""
    return max(64, CHUNK_BYTES // (vocabulary * itemsize) // 64 * 64)


class NormedHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of rmsnorm(hidden) @ weightᵀ: hidden [T, H], norm weight [H], weight [V, H], labels [T].

    Returns a float32 scalar. Only hidden gets a gradient: norm and head are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss; and each row's gradient, kept over its normalised input."""
        normed, rstd = rms_norm(hidden, norm, eps)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = chunk_rows(len(weight), weight.element_size())
        # One for all chunks: with a tensor for each, the one before would still be there while the next is made.
        buffer = normed.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part = normed[start : start + rows]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            cross_entropy_(logits, labels[start : start + rows], losses[start : start + rows])
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=part)
        ctx.kept = (hidden, norm, rstd, normed)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Through the norm."""
        hidden, norm, rstd, grad = ctx.kept
        ctx.kept = None
        return rms_norm_backward(grad, hidden, norm, rstd, scale=grads[0]), None, None, None, None


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> None:
    """Write each row's loss [T] in float32, and over logits [T, V] the gradient of the losses' sum."""
    if not uses_kernels(logits):
        counted = labels != IGNORED
        target = torch.where(counted, labels, 0)[:, None]
        log_probs = logits.float().log_softmax(-1)
        losses.copy_(torch.where(counted, -log_probs.gather(1, target)[:, 0], 0))
        grad = log_probs.exp().scatter_add(1, target, torch.full_like(target, -1, dtype=torch.float32))
        logits.copy_(grad * counted[:, None])
        return
    rows, width = logits.shape
    _cross_entropy[(rows,)](
        logits, labels, losses, logits.stride(0),
        WIDTH=width, IGNORED=IGNORED, BLOCK=4096 if width > 4096 else 1024, num_warps=8,
    )  # fmt: skip


@triton.jit
def _cross_entropy(
    logits, labels, losses, stride, WIDTH: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        for first in range(0, WIDTH, BLOCK):
            column = first + tl.arange(0, BLOCK)
            tl.store(start + column, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=column < WIDTH)
        return
    own = tl.load(start + label).to(tl.float32)  # here, with barriers between this and the writing below
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(start + column, mask=column < WIDTH, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, values)
        # Lanes beyond the width stay at -inf, where a difference would be nan.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(values - higher))
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - highest)), 0))
    tl.store(losses + row, log_sum - own)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(start + column, mask=column < WIDTH, other=float("-inf")).to(tl.float32)
        grad = tl.exp(values - log_sum) - tl.where(column == label, 1.0, 0.0)
        tl.store(start + column, grad.to(logits.dtype.element_ty), mask=column < WIDTH)
