"""From the manifest and the plan to transformers' arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.evaluation import mean_loss
from qlora_trainer.hardware import Hardware
from qlora_trainer.training import _arguments, warmup_steps
from qlorajob.errors import StepError
from qlorajob.precision import NumberTypes
from tests.unit.trainer.jobs import Job

CPU = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")


def _chosen(job: Job, micro_batch: int = 1, **training: Any) -> Any:
    config = job.change(training=training).config(micro_batch=micro_batch)
    assert config.plan is not None
    return _arguments(config.spec, config.plan, CPU, 100, Path("/tmp/x"), evaluates=False)


@pytest.mark.parametrize(
    ("training", "argument", "value"),
    [
        ({"learningRate": 3e-4}, "learning_rate", 3e-4),
        ({"weightDecay": 0.001}, "weight_decay", 0.001),
        ({"maxGradNorm": 0.7}, "max_grad_norm", 0.7),
        ({"loggingSteps": 25}, "logging_steps", 25),
        ({"saveSteps": 50}, "save_steps", 50),
        ({"seed": 7}, "seed", 7),
        ({"warmupSteps": 2}, "warmup_steps", 2),
        ({"warmupRatio": 0.1}, "warmup_steps", 10),
        ({"packing": False, "groupByLength": True}, "train_sampling_strategy", "group_by_length"),
        *[
            ({"scheduler": name}, "lr_scheduler_type", name)
            for name in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
        ],
    ],
)
def test_a_field_reaches_the_trainer(job: Job, training: dict[str, Any], argument: str, value: Any) -> None:
    assert getattr(_chosen(job, **training), argument) == value


def test_no_checkpoints_when_save_steps_is_zero(job: Job) -> None:
    assert _chosen(job, saveSteps=0).save_strategy == "no"


def test_micro_batch_and_accumulation_are_the_plan_s(job: Job) -> None:
    chosen = _chosen(job, micro_batch=2, globalBatchSize=8)
    assert (chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps) == (2, 4)


def test_warmup_steps_win_over_the_ratio(job: Job) -> None:
    spec = job.change(training={"warmupSteps": 0, "warmupRatio": 0.5}).config().spec
    assert warmup_steps(spec, 100) == 0


def _last_loss(job: Job, **options: Any) -> float:
    progress = job.train(**options).progress
    assert progress is not None
    assert progress.loss is not None
    return progress.loss


def test_the_micro_batch_does_not_change_the_result(job: Job) -> None:
    job.change(training={"globalBatchSize": 4}, lora={"dropout": 0})
    one = _last_loss(job)
    job.change(output={"uri": f"file://{job.folder}/again"})
    assert _last_loss(job, micro_batch=4) == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({"packing": False}, id="padded rows"),
        pytest.param({"packing": False, "groupByLength": True}, id="grouped by length"),
        pytest.param({"precision": "bf16"}, id="bf16 on CPU"),
        pytest.param({"optimizer": "adafactor"}, id="adafactor"),
        pytest.param({"optimizer": "sgd", "saveSteps": 2}, id="sgd"),
    ],
)
def test_a_run_with_other_settings_ends_with_an_adapter(job: Job, training: dict[str, Any]) -> None:
    artifacts = job.train(job.change(training=training).prepare()).artifacts
    assert artifacts is not None
    assert artifacts.adapter is not None


def test_the_validation_loss_has_an_interval_of_its_own_and_does_not_change_the_result(job: Job) -> None:
    job.change(lora={"dropout": 0.5}, training={"saveSteps": 0})
    prepared = job.prepare()
    job.train(prepared)
    path = f"{prepared.run_id}/adapter/adapter_model.safetensors"
    never = (job.output / path).read_bytes()
    job.change(training={"evalSteps": 3}, output={"uri": f"file://{job.folder}/again"})
    assert job.prepare().run_id == prepared.run_id
    job.train(prepared)
    again = job.folder / "again"
    evaluations = json.loads((again / prepared.run_id / "report.json").read_text())["loss"]["evaluations"]
    assert [entry["step"] for entry in evaluations] == [3, 4]
    assert (again / path).read_bytes() == never


def test_the_last_loss_is_that_of_the_last_step(job: Job) -> None:
    """The report says so, whatever the interval."""
    job.change(training={"maxSteps": 5, "loggingSteps": 3})
    prepared = job.prepare()
    done = job.train(prepared)
    loss = job.result(prepared, "report.json")["loss"]
    assert [point["step"] for point in loss["curve"]] == [1, 3, 5]
    assert done.progress is not None
    assert done.progress.loss == loss["last"] == loss["curve"][-1]["loss"]


def test_gradient_checkpointing_does_not_change_the_result(job: Job) -> None:
    job.change(lora={"dropout": 0})
    plain = _last_loss(job)
    job.change(output={"uri": f"file://{job.folder}/again"})
    assert _last_loss(job, checkpointing="full") == pytest.approx(plain, rel=1e-5)


def test_data_that_changed_after_prepare_are_refused(job: Job, instructions: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data.jsonl"
    copy.write_bytes(instructions.read_bytes())
    prepared = job.change(dataset={"uri": f"file://{copy}"}).prepare()
    copy.write_bytes(instructions.read_bytes() + b'{"instruction": "one", "output": "more"}\n')
    with pytest.raises(StepError, match="the data changed since they were prepared") as refused:
        job.train(prepared)
    assert refused.value.field == "dataset.uri"


def test_the_mean_loss_weighs_tokens_not_batches(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    def batch(*ids: int) -> dict[str, torch.Tensor]:
        row = torch.tensor([ids])
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}

    short, long = batch(5, 6), batch(7, 8, 9, 10, 11, 12)
    expected = (mean_loss(model, [short]) + 5 * mean_loss(model, [long])) / 6
    assert mean_loss(model, [short, long]) == pytest.approx(expected)
