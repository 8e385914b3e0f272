"""The fused head and loss: what they compute, and how many logits are there at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.fast import cross_entropy
from qlora_trainer.fast.cross_entropy import NormedHeadLoss
from qlora_trainer.formats import IGNORED

VOCABULARY, HIDDEN, TOKENS, ROWS = 512, 32, 250, 64


class LogitsAlive(TorchDispatchMode):
    """Counts the most rows of logits, of the head's own type, that existed at the same time."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._weight = weight.data_ptr()  # transposed, it is as wide as logits are
        self._alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16 and result.shape[-1] == VOCABULARY:
            storage = result.untyped_storage()
            if storage.data_ptr() == self._weight:
                return result
            self._alive[storage.data_ptr()] = storage
            rows = sum(each.nbytes() for each in self._alive.values()) // (2 * VOCABULARY)
            self.most = max(self.most, rows)
        return result


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks, the last of which isn't full."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", ROWS * VOCABULARY * 2)


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, norm = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.rand(HIDDEN, dtype=dtype) + 0.5
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::7] = IGNORED
    return hidden.requires_grad_(), norm, torch.randn(VOCABULARY, HIDDEN, dtype=dtype), labels


def test_the_logits_of_one_chunk_are_there_at_once() -> None:
    hidden, norm, weight, labels = _inputs(torch.bfloat16)
    with LogitsAlive(weight) as counted:
        NormedHeadLoss.apply(hidden, norm, 1e-5, weight, labels).backward()
    assert counted.most == ROWS


def test_loss_and_gradient_are_those_of_the_whole_batch() -> None:
    hidden, norm, weight, labels = _inputs(torch.float32)
    NormedHeadLoss.apply(hidden, norm, 1e-5, weight, labels).backward()
    found = NormedHeadLoss.apply(hidden, norm, 1e-5, weight, labels)
    again = hidden.detach().clone().requires_grad_()
    logits = functional.rms_norm(again, (HIDDEN,), norm, 1e-5) @ weight.T
    expected = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hidden.grad, again.grad)
