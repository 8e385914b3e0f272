"""The GPU starts while Python imports."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from qlora_trainer.hardware import wake_gpu
from qlorajob.plan import Plan, Requests

CPU_PLAN = Plan(
    gpu_class="cpu", gpus=0, predicted_peak_bytes=1, micro_batch_size=1, gradient_accumulation=1, checkpointing="none",
    requests=Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"), reason="a test",
)  # fmt: skip
GPU_PLAN = CPU_PLAN.model_copy(update={"gpu_class": "l4", "gpus": 1})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Devices on which something was allocated; CUDA says that it is there."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: found.append(device))
    return found


@pytest.mark.parametrize(("plan", "devices"), [(GPU_PLAN, ["cuda"]), (CPU_PLAN, [])])
def test_a_gpu_starts_where_the_plan_has_one(plan: Plan, devices: list[str], asked: list[Any]) -> None:
    wake_gpu(plan).join()
    assert asked == devices


def test_a_gpu_that_does_not_start_is_left_to_whoever_needs_it(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, device: str) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", fail)
    with caplog.at_level(logging.INFO):
        wake_gpu(GPU_PLAN).join()
    assert "doesn't start yet: CUDA error: out of memory" in caplog.text
