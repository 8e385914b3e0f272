"""training.backend: unsloth, on Unsloth's CPU backend: the same manifest gives the same outputs.

`.venv` has no Unsloth. This gives it to an environment on top of that one, and runs them:
    uv venv /tmp/u && echo $PWD/.venv/lib/python3.11/site-packages > /tmp/u/lib/python3.11/site-packages/venv.pth \
      && uv pip install --python /tmp/u/bin/python --no-deps $(comm -13 requirements/{trainer,unsloth}.txt) \
      && /tmp/u/bin/python -m pytest -n0 tests/unit/trainer/test_unsloth.py
"""  # fmt: skip

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from qlorajob.errors import ExitCode
from qlorajob.run import RunReport
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="no unsloth here; this file's docstring installs it"
)

ROOT = Path(__file__).parents[3]
STEPS, STOP_AFTER = 5, 3
STEP = """
import os, socket, sys
socket.socket.connect = lambda *_: os._exit(99)  # nothing is asked of the network
from qlora_trainer.__main__ import main
sys.exit(main(["train"]))
"""
STOPPED_STEP = f"""
import qlora_trainer.__main__ as command
from tests.unit.trainer.test_resume import StopAfter
command.StopSignal = lambda: StopAfter({STOP_AFTER})
{STEP}
"""
EVERYTHING = {
    "training": {"maxSteps": STEPS, "globalBatchSize": 4, "saveSteps": 2},
    "lora": {"dropout": 0.2},  # so that a random state that isn't restored shows
    "evaluation": {"prompts": ["code of zulu ="], "maxNewTokens": 4},
    "merge": {"enabled": True, "dtype": "float32"},
}


@dataclass(frozen=True)
class Run:
    """A job with Unsloth, whose steps are processes of their own: it patches the libraries of the one it is in."""

    job: Job

    @classmethod
    def of(cls, folder: Path, model: Path, data: Path) -> Run:
        return cls(Job(folder, model, data).change(**EVERYTHING).change(training={"backend": "unsloth"}))

    @cached_property
    def prepared(self) -> Prepared:
        return self.job.prepare()

    def train(self, code: str = STEP) -> RunReport:
        """As a pod does, with a working directory that nothing can be written to and no network."""
        config = self.job.config(self.prepared, micro_batch=2, checkpointing="full")
        path = f"{ROOT}:{ROOT}/operator:{ROOT}/trainer_image:{ROOT}/dev"
        environment = {**os.environ, **self.job.environment(config), "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env=environment, cwd="/proc/self", capture_output=True, text=True, timeout=600)
        assert ran.returncode in (ExitCode.DONE, ExitCode.INTERRUPTED, ExitCode.INVALID), (
            ran.stdout[-3000:] + ran.stderr[-3000:]
        )
        return RunReport.model_validate_json((self.job.folder / "report.json").read_text(encoding="utf-8"))

    @property
    def adapter(self) -> Path:
        return self.job.output / self.prepared.run_id / "adapter"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load((self.adapter / "adapter_model.safetensors").read_bytes())

    @property
    def report(self) -> Any:
        return self.job.result(self.prepared, "report.json")

    @property
    def curve(self) -> list[float]:
        return [point["loss"] for point in self.report["loss"]["curve"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> Run:
    run = Run.of(tmp_path_factory.mktemp("unsloth"), model_folder, instructions)
    report = run.train()
    assert report.exit_code == ExitCode.DONE, report.message
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> Run:
    """The same manifest, with the hf backend."""
    run = Run(Job(tmp_path_factory.mktemp("hf"), model_folder, instructions).change(**EVERYTHING))
    run.job.train(run.prepared, micro_batch=2, checkpointing="full")
    return run


def test_the_adapter_has_the_same_tensors(trained: Run, reference: Run) -> None:
    found, expected = trained.tensors, reference.tensors
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_adapter_is_described_alike(trained: Run, reference: Run) -> None:
    found, expected = (json.loads((run.adapter / "adapter_config.json").read_text()) for run in (trained, reference))
    same = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert sorted(found["target_modules"]) == sorted(expected["target_modules"])


def test_the_losses_are_the_same(trained: Run, reference: Run) -> None:
    """Packed rows that see no other, two micro batches of two rows a step, the same first adapter and dropout."""
    assert len(trained.curve) == STEPS
    assert trained.curve == pytest.approx(reference.curve, rel=1e-3)
    assert trained.report["loss"]["evalTuned"] == pytest.approx(reference.report["loss"]["evalTuned"], rel=1e-3)


def test_padded_rows_and_peft_s_own_choice_of_layers_give_the_same_losses_too(
    tmp_path: Path, model_folder: Path, instructions: Path
) -> None:
    changes = {"training": {"packing": False}, "lora": {"targetModules": "default"}}
    run = Run.of(tmp_path / "unsloth", model_folder, instructions)
    run.job.change(**changes)
    expected = Run(Job(tmp_path / "hf", model_folder, instructions).change(**EVERYTHING).change(**changes))
    expected.job.train(expected.prepared, micro_batch=2)
    assert run.train().exit_code == ExitCode.DONE
    assert run.curve == pytest.approx(expected.curve, rel=1e-3)
    assert run.tensors.keys() == expected.tensors.keys()


def test_the_base_answers_alike(trained: Run, reference: Run) -> None:
    assert trained.report["prompts"][0]["before"] == reference.report["prompts"][0]["before"]


def test_the_report_says_what_trained(trained: Run) -> None:
    model = trained.report["model"]
    assert model["quantization"]["type"] == ["nf4"]
    assert model["modules"]["Linear4bit"] == 14
    versions = trained.report["provenance"]["versions"]
    assert {"unsloth", "unsloth_zoo"} <= versions.keys()


def test_weights_that_are_not_those_of_the_config_are_refused(
    tmp_path: Path, model_folder: Path, instructions: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    report = Run.of(tmp_path / "run", folder, instructions).train()
    assert report.exit_code == ExitCode.INVALID
    assert "model.layers.0.mlp.down_proj.weight is 64×128, and should be 64×96" in report.message


def test_a_stopped_run_goes_on_and_ends_with_the_same_adapter(
    trained: Run, tmp_path: Path, model_folder: Path, instructions: Path
) -> None:
    run = Run.of(tmp_path, model_folder, instructions)
    assert run.train(STOPPED_STEP).exit_code == ExitCode.INTERRUPTED
    assert run.train().exit_code == ExitCode.DONE
    assert run.report["training"]["resumedAt"] == [STOP_AFTER]
    assert all(torch.equal(tensor, run.tensors[name]) for name, tensor in trained.tensors.items())


def test_its_adapter_is_merged(trained: Run) -> None:
    merged = trained.job.run("merge", trained.job.config(trained.prepared)).artifacts
    assert merged is not None
    assert merged.merged is not None
