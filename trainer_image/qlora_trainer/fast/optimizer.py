"""bitsandbytes' optimizers without their waits."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import optimizer as bitsandbytes

RESIDENT_SHARE = 0.05
"""Optimizer states that take up to this share of a GPU's memory stay there."""


def let_optimizers_run_ahead() -> None:
    """Stop bitsandbytes from waiting for the GPU after each parameter's update: 448 times a step for an adapter of 7B.

    All updates are launched on the stream that computes the gradients and reads the weights, so they are in order
    without it. Reading a state, for a checkpoint say, waits by itself.
    """
    bitsandbytes.sync_gpu = lambda *_: None


def keep_small_states_resident(optimizer: Any, memory: int) -> bool:
    """Keep a paged optimizer's states on the GPU, of `memory` bytes, where they are small beside it.

    Paging is for states that may have to leave; asking for each of them in every step costs more than an adapter's
    update itself. States have the same names and values either way, so a checkpoint goes on under both.
    Returns whether the optimizer pages no more.
    """
    if not isinstance(optimizer, bitsandbytes.Optimizer8bit) or not optimizer.is_paged:
        return False
    bits = optimizer.args.optim_bits
    values = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    if 2 * values * bits // 8 > RESIDENT_SHARE * memory:
        return False
    optimizer.is_paged = False
    return True


def gpu_memory() -> int:
    """Bytes that the GPU has."""
    return torch.cuda.mem_get_info()[1]
