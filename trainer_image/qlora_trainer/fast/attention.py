"""Causal attention forward and backward, on whole rows or on packed documents, without a mask of length².

On Hopper and newer whole rows go to cuDNN, the fastest there is; everything else goes to the variable-length
FlashAttention that torch brings. Both are called below autograd, so that a layer decides itself what it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Layout:
    """How T tokens in one line are rows, or documents."""

    rows: int
    """Rows of equal length; unused with documents."""
    ends: torch.Tensor | None = None
    """With documents: where each begins, and T at the end, int32 [documents + 1]. Empty ones may follow."""
    longest: int = 0
    """With documents: at least the longest one's length."""

    def longest_of(self, tokens: int) -> int:
        """Tokens of the longest document, or row, of so many tokens in all."""
        return tokens // self.rows if self.ends is None else self.longest


@dataclass(frozen=True, slots=True)
class Attended:
    """The result [T, heads, D] and what the backward pass needs besides."""

    out: torch.Tensor
    statistics: tuple[Any, ...]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> Attended:
    """Attention of q [T, heads, D] to k and v [T, key/value heads, D]; only the last dimension must be dense."""
    if not q.is_cuda:
        return Attended(_plain(q, k, v, layout), ())
    if layout.ends is not None or not _cudnn_is_best(q):
        ends, longest = _documents(len(q), layout)
        out, *statistics = aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, True, False)
        return Attended(out, tuple(statistics[:3]))
    out, *statistics = aten._scaled_dot_product_cudnn_attention(
        *(_in_rows(tensor, layout) for tensor in (q, k, v)), None, True, 0.0, True
    )
    return Attended(out.transpose(1, 2).reshape(q.shape), (statistics[0], statistics[5], statistics[6]))


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each of its shape."""
    if not q.is_cuda:
        return _plain_backward(grad, q, k, v, layout)
    if layout.ends is not None or not _cudnn_is_best(q):
        ends, longest = _documents(len(q), layout)
        log_sums, random, unused = attended.statistics
        return aten._flash_attention_backward(  # type: ignore[no-any-return]
            grad, q, k, v, attended.out, log_sums, ends, ends, longest, longest,
            0.0, True, random, unused,
        )  # fmt: skip
    log_sums, seed, offset = attended.statistics
    length = len(q) // layout.rows
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(_in_rows(tensor, layout) for tensor in (grad, q, k, v, attended.out)),
        log_sums, seed, offset, None, None, None, length, length, 0.0, True,
    )  # fmt: skip
    dq, dk, dv = (part.transpose(1, 2).flatten(0, 1) for part in grads)
    return dq, dk, dv


def _cudnn_is_best(q: torch.Tensor) -> bool:
    return torch.cuda.get_device_capability(q.device)[0] in (9, 10) and q.shape[-1] <= 128


def _documents(tokens: int, layout: Layout) -> tuple[torch.Tensor, int]:
    """Where documents begin and end, and the longest one's length; rows are documents too."""
    if layout.ends is not None:
        return layout.ends, layout.longest
    length = tokens // layout.rows
    return torch.arange(layout.rows + 1, dtype=torch.int32, device="cuda") * length, length


def _in_rows(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[T, heads, D] → [rows, heads, length, D], a view."""
    return tensor.view(layout.rows, -1, *tensor.shape[1:]).transpose(1, 2)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    rows = torch.arange(layout.rows + 1) * (len(q) // max(1, layout.rows))
    ends = rows if layout.ends is None else layout.ends
    token = torch.arange(len(q))
    document = torch.searchsorted(ends[1:].contiguous(), token, right=True)
    mask = (document[:, None] == document[None, :]) & (token[:, None] >= token[None, :])
    one, two, three = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(one, two, three, mask, enable_gqa=True)[0].transpose(0, 1)


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    with torch.enable_grad():
        out = _plain(q, k, v, layout)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq, dk, dv
