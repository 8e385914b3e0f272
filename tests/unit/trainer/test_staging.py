"""Without a GPU, transformers copies weights as it always does. The copying itself: tests/gpu/test_staging.py."""

from __future__ import annotations

import pytest
import torch
from transformers import core_model_loading

from qlora_trainer import staging
from qlora_trainer.staging import staged_loading


def test_on_a_cpu_transformers_is_left_alone() -> None:
    usual = core_model_loading._materialize_copy
    with staged_loading(on_gpu=False):
        assert core_model_loading._materialize_copy is usual


@pytest.mark.parametrize(
    ("tensor", "device", "dtype"),
    [
        pytest.param(torch.arange(6.0), torch.device("cpu"), None, id="stays on the CPU"),
        pytest.param(torch.arange(6.0), None, None, id="goes nowhere"),
        pytest.param(torch.arange(6.0), torch.device("meta"), torch.float16, id="gets another type"),
    ],
)
def test_what_does_not_go_to_a_gpu_goes_its_usual_way(
    monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None
) -> None:
    class NoStage:
        def copy(self, *_: object) -> torch.Tensor:
            raise AssertionError("staged")

    monkeypatch.setattr(staging, "Stage", NoStage)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    usual = core_model_loading._materialize_copy
    with staged_loading(on_gpu=True):
        copied = core_model_loading._materialize_copy(tensor, device, dtype)
        expected = usual(tensor, device, dtype)
    assert (copied.device, copied.dtype, copied.shape) == (expected.device, expected.dtype, expected.shape)
    assert core_model_loading._materialize_copy is usual
