"""Weights from files to the GPU through page-locked memory.

transformers copies one tensor after the other from the mapped file when it quantizes while it loads. The driver then
copies by way of a buffer of its own, with one thread, which also takes the file's page faults. Here all threads fill
one half of a page-locked buffer while the GPU fetches the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import core_model_loading

CHUNK_BYTES = 64 << 20
"""Of each half. Large enough that starting a copy costs nothing beside it."""


class Stage:
    """Two halves of page-locked memory, by way of which tensors are copied to a GPU."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._halves = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._fetched = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A contiguous tensor of the host's, on the device. Whoever uses it on the current stream needn't wait."""
        target = torch.empty_like(tensor, device=device)
        source = tensor.view(-1).view(torch.uint8)
        wanted = target.view(-1).view(torch.uint8)
        with torch.cuda.device(device):
            for start in range(0, source.numel(), self._halves[0].numel()):
                self._copy_chunk(source[start:], wanted[start:])
        return target

    def _copy_chunk(self, source: torch.Tensor, wanted: torch.Tensor) -> None:
        """As much as goes into the half whose turn it is, once the GPU has what was there before."""
        half, fetched = self._halves[self._turn], self._fetched[self._turn]
        size = min(half.numel(), source.numel())
        fetched.synchronize()
        half[:size].copy_(source[:size])
        wanted[:size].copy_(half[:size], non_blocking=True)
        fetched.record()
        self._turn = 1 - self._turn


@contextmanager
def staged_loading(*, on_gpu: bool) -> Iterator[None]:
    """Let transformers copy by way of a stage. What isn't copied as it is, or stays on the CPU, goes its usual way."""
    if not on_gpu:
        yield
        return
    stage, usual = Stage(), core_model_loading._materialize_copy

    def copy(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        found: torch.Tensor = tensor[...]  # of the file's
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if to_gpu and found.numel() and found.is_contiguous() and not found.is_cuda and dtype in (None, found.dtype):
            return stage.copy(found, torch.device(device))
        return usual(found, device, dtype)  # type: ignore[no-any-return]

    with patch.object(core_model_loading, "_materialize_copy", copy):
        yield
    torch.cuda.synchronize()  # the halves are freed now
