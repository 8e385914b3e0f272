"""A model with code of its own on a GPU, through the trainer's own commands: ChatGLM2's interface, R4's settings."""

from __future__ import annotations

import pytest

from bench.folders import save_rows, tokenizer
from bench.jobs import Ran, plan_of, run_step, spec_of
from qlorajob.errors import ExitCode
from tests.support.families import FAMILIES, write_model

STEPS = 8
CHATGLM = next(family for family in FAMILIES if family.model_type == "chatglm")


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("chatglm")
    model = write_model(CHATGLM, tokenizer(), folder / "model")
    spec = spec_of(
        {
            "model": {"uri": f"file://{model}", "trustRemoteCode": True},
            "dataset": {"uri": f"file://{save_rows(folder / 'rows.jsonl', 64, 40)}", "validation": {"fraction": 0.1}},
            "lora": {"rank": 8, "alpha": 32, "dropout": 0.1, "targetModules": "default"},
            "training": {
                "maxSteps": STEPS, "globalBatchSize": 8, "maxSequenceLength": 64, "learningRate": 2e-2,
                "packing": False, "precision": request.param, "loggingSteps": 1, "saveSteps": 4,
            },
            "evaluation": {"prompts": ["w3 w4"], "maxNewTokens": 4},
            "output": {"uri": f"file://{folder}/output"},
        }
    )  # fmt: skip
    prepared = run_step("prepare", spec, folder).report.prepared
    assert prepared is not None
    ran = run_step("train", spec, folder, plan=plan_of(spec, rows=4, checkpointing="full"), prepared=prepared)
    assert ran.report.exit_code == ExitCode.DONE, ran.report.message
    return ran


def test_it_learns(trained: Ran) -> None:
    progress = trained.report.progress
    assert progress is not None
    assert progress.eval_loss is not None
    assert progress.base_eval_loss is not None
    assert progress.eval_loss < progress.base_eval_loss - 0.05
    assert len(trained.losses) == STEPS


def test_its_own_loss_is_taken_and_that_is_said(trained: Ran) -> None:
    said = [line["message"] for line in trained.log]
    assert any(
        "the loss holds all of a micro batch's logits at once: TRL's fused head fails here" in text for text in said
    )
