"""Whether a piece runs as a Triton kernel or as plain torch operations."""

from __future__ import annotations

import torch

INTERPRETED = False
"""Run the kernels on CPU tensors too: for tests under Triton's interpreter (TRITON_INTERPRET=1)."""


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether operations on this tensor are Triton kernels."""
    return tensor.is_cuda or INTERPRETED
