"""Paged optimizer states after a resume.

bitsandbytes loads them into plain GPU memory, from where nothing is paged out when an activation needs the room.
"""

from __future__ import annotations

from typing import Any

import torch


def restore_pages(optimizer: Any) -> int:
    """Move a paged optimizer's loaded states back into paged memory; how many bytes.

    `optimizer` is what training uses, in accelerate's wrapper or not; other optimizers than bitsandbytes' paged ones
    are left alone. Which states are paged is up to bitsandbytes: those of small parameters aren't.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return 0
    moved = 0
    for parameter, state in inner.state.items():
        if parameter.device.type != "cuda":
            continue
        for name in ("state1", "state2"):
            value = state.get(name)
            if value is None or getattr(value, "is_paged", False):
                continue
            buffer = inner.get_state_buffer(parameter, dtype=value.dtype)
            if getattr(buffer, "is_paged", False):
                buffer.copy_(value)
                state[name] = buffer
                moved += buffer.nbytes
    if moved:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return moved
