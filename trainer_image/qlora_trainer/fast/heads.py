"""How a product of q, k and v becomes what attention reads, and how the gradient comes back through that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_trainer.fast.head_norm import norm_and_rotate, norm_and_rotate_backward
from qlora_trainer.fast.rope import rotate

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q [T, query heads, D], of k and v [T, key heads, D]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a layer, of D numbers each. A product is [T, (query heads + 2 · key heads) · D].

    cos and sin are [T, R/2]: the first R numbers of each head are rotated, all D where heads are normed.

    A layer keeps the product alone. Without norms q and k are rotated where they are. Where they are normed, the
    product stays as it was, since the way back through a norm starts there; attention reads a copy of q and k, which
    lives as long as attention runs and is made again for its backward pass: one kernel at memory speed.
    """

    queries: int
    keys: int
    size: int
    norms: torch.Tensor | None = None
    """Weights of the norms of all query heads and, below them, all key heads [query heads + key heads, D]."""
    eps: float = 0.0

    def settle(self, product: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn a product, in place, into what is kept of it."""
        if self.norms is None:
            rotated = self._queries_and_keys(product)
            rotate(rotated, cos, sin, rotated)

    def read(self, kept: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Parts:
        """What attention reads: views of what is kept; of a copy where q and k are normed."""
        q, k, v = self._split(kept)
        if self.norms is None:
            return q, k, v
        source = self._queries_and_keys(kept)
        normed = source.new_empty(source.shape)
        norm_and_rotate(source, self.norms, cos, sin, self.eps, normed)
        return normed[:, : self.queries], normed[:, self.queries :], v

    def backward(self, grads: Parts, kept: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The product's gradient, written over what was kept of it, from those of what attention has read."""
        q, k, v = self._split(kept)
        if self.norms is None:
            rotate(grads[0], cos, sin, q, back=True)
            rotate(grads[1], cos, sin, k, back=True)
        else:
            norm_and_rotate_backward(grads[0], q, self.norms[: self.queries], cos, sin, self.eps)
            norm_and_rotate_backward(grads[1], k, self.norms[self.queries :], cos, sin, self.eps)
        v.copy_(grads[2])

    def _split(self, product: torch.Tensor) -> Parts:
        """q, k and v: views."""
        heads, end = product.view(len(product), -1, self.size), self.queries + self.keys
        return heads[:, : self.queries], heads[:, self.queries : end], heads[:, end:]

    def _queries_and_keys(self, product: torch.Tensor) -> torch.Tensor:
        """Both side by side [T, query heads + key heads, D]: a view."""
        return product.view(len(product), -1, self.size)[:, : self.queries + self.keys]
