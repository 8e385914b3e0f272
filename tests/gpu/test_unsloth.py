"""training.backend: unsloth on a GPU, through the trainer's own commands, beside hf: the same losses and adapter."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.folders import save_model, save_rows
from bench.jobs import Ran, plan_of, run_step, spec_of
from bench.models import Shape
from qlorajob.errors import ExitCode
from qlorajob.spec import QLoRAJobSpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no unsloth here")

MODEL = Shape("llama", 512, 1024, 3, 4, 2, 2048)
ROWS, LENGTH, STEPS = 64, 512, 8
WAYS = {
    "packed": ({"packing": True}, {"checkpointing": "none"}),
    "padded, offloaded": ({"packing": False}, {"checkpointing": "full", "offload_checkpoints": True}),
}
"""Of training, and of the plan."""


@dataclass(frozen=True)
class Trained:
    """How a job ended with each backend."""

    ran: dict[str, Ran]
    adapters: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=list(WAYS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("unsloth")
    model = save_model(MODEL, folder / "model")
    rows = save_rows(folder / "rows.jsonl", ROWS, LENGTH // 3)
    training, cut = WAYS[request.param]
    ran, adapters = {}, {}
    for backend in ("hf", "unsloth"):
        spec = _spec(model, rows, folder / backend, {"backend": backend, **training})
        prepared = run_step("prepare", spec, folder / backend).report.prepared
        assert prepared is not None
        plan = plan_of(spec, rows=2, **cut)
        ran[backend] = run_step("train", spec, folder / backend, plan=plan, prepared=prepared, limit=240)
        report = ran[backend].report
        assert report.exit_code == ExitCode.DONE, report.message
        adapter = folder / backend / "output" / prepared.run_id / "adapter" / "adapter_model.safetensors"
        adapters[backend] = load_file(adapter)
    return Trained(ran, adapters)


def _spec(model: Path, rows: Path, folder: Path, training: dict[str, Any]) -> QLoRAJobSpec:
    return spec_of(
        {
            "model": {"uri": f"file://{model}"},
            "dataset": {"uri": f"file://{rows}", "validation": {"fraction": 0.1}},
            "lora": {"rank": 8, "alpha": 16, "dropout": 0},
            "training": {
                "maxSteps": STEPS, "globalBatchSize": 4, "maxSequenceLength": LENGTH, "learningRate": 2e-3,
                "loggingSteps": 1, "saveSteps": 4, **training,
            },
            "evaluation": {"prompts": ["one two", "three"], "maxNewTokens": 4},
            "output": {"uri": f"file://{folder}/output"},
        }
    )  # fmt: skip


def test_the_losses_are_the_same_but_for_rounding(trained: Trained) -> None:
    """Two micro batches a step; answers were generated before the first."""
    found, expected = trained.ran["unsloth"].losses, trained.ran["hf"].losses
    print({"hf": expected, "unsloth": found})
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-2)


def test_the_validation_losses_are_the_same_but_for_rounding(trained: Trained) -> None:
    found, expected = (trained.ran[backend].report.progress for backend in ("unsloth", "hf"))
    assert found is not None
    assert expected is not None
    assert found.base_eval_loss == pytest.approx(expected.base_eval_loss, rel=1e-2)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=2e-2)


def test_the_adapter_has_the_same_tensors(trained: Trained) -> None:
    found, expected = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in trained.adapters[backend].items()}
        for backend in ("unsloth", "hf")
    )
    assert found == expected
