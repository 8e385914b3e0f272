"""A run that is stopped and started again ends with the same adapter, to the bit, as one that wasn't."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from qlora_trainer.signals import StopSignal
from qlora_trainer.storage import Storage, open_storage
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.run import RunReport
from qlorajob.status import Prepared
from tests.support.events import scalars
from tests.support.faulty_s3 import FaultyS3
from tests.unit.trainer.gateway import Gateway
from tests.unit.trainer.jobs import Job

STEPS, STOP_AFTER = 6, 3
ROOT = Path(__file__).parents[3]


class StopAfter(StopSignal):
    """Is asked to stop while a given optimizer step runs."""

    def __init__(self, step: int) -> None:
        self._looks = step
        super().__init__()

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Looked at once at the end of each step."""
        self._looks -= 1
        return self._looks <= 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


class CrashAfter(StopAfter):
    """Has its process die at the end of a given step, before anything of it is saved."""

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """See StopAfter."""
        self._looks -= 1
        if self._looks == 0:
            raise RuntimeError("a crash")
        return False

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def _job(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path, **training: Any) -> Job:
    job = Job(tmp_path_factory.mktemp("resume"), model, data)
    return job.change(
        training={"maxSteps": STEPS, **training},
        lora={"dropout": 0.2},  # so that a random state that isn't restored shows
        evaluation={"prompts": ["code of zulu"], "maxNewTokens": 4},
    )


def _weights(job: Job, prepared: Prepared) -> bytes:
    return (job.output / prepared.run_id / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> bytes:
    job = _job(tmp_path_factory, model_folder, instructions)
    prepared = job.prepare()
    job.train(prepared)
    return _weights(job, prepared)


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path
) -> tuple[Job, Prepared, StepError]:
    """A job that was asked to stop, and how it ended then."""
    job = _job(tmp_path_factory, model_folder, instructions)
    prepared = job.prepare()
    with pytest.raises(StepError) as ended:
        job.run("train", job.config(prepared), StopAfter(STOP_AFTER))
    return job, prepared, ended.value


def test_a_stop_ends_with_its_own_exit_code(stopped: tuple[Job, Prepared, StepError]) -> None:
    _, _, end = stopped
    assert (end.code, end.reason) == (ExitCode.INTERRUPTED, Reason.INTERRUPTED)
    assert f"stopped after step {STOP_AFTER} of {STEPS}" in end.message


def test_a_stop_leaves_a_checkpoint_and_no_manifest(stopped: tuple[Job, Prepared, StepError]) -> None:
    job, prepared, _ = stopped
    run = job.output / prepared.run_id
    assert [path.name.partition(".")[0] for path in (run / "checkpoints").iterdir()] == [f"step-{STOP_AFTER}"]
    assert not (run / "manifest.json").exists()


@pytest.fixture(scope="module")
def resumed(stopped: tuple[Job, Prepared, StepError]) -> tuple[Job, Prepared]:
    job, prepared, _ = stopped
    job.train(prepared)
    return job, prepared


def test_a_resumed_run_has_the_same_adapter_to_the_bit(resumed: tuple[Job, Prepared], uninterrupted: bytes) -> None:
    assert _weights(*resumed) == uninterrupted


def test_a_resumed_run_reports_all_of_its_losses(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    assert [point["step"] for point in job.result(prepared, "report.json")["loss"]["curve"]] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_a_resumed_run_as_one_curve(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    loss = job.result(prepared, "report.json")["loss"]
    found = scalars(job.output / prepared.run_id / "tensorboard")
    assert found["train/loss"] == [(point["step"], pytest.approx(point["loss"])) for point in loss["curve"]]
    assert [step for step, _ in found["train/tokens_per_second"]] == [1, 2, 3, 4, 5, 6]
    assert found["eval/loss"] == [(0, pytest.approx(loss["evalBase"])), (STEPS, pytest.approx(loss["evalTuned"]))]


def test_a_resumed_run_reports_the_base_model_s_loss_and_answers(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    report = job.result(prepared, "report.json")
    assert report["loss"]["evalBase"] is not None
    assert report["prompts"][0]["before"]


def test_a_resumed_run_says_where_it_resumed(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    assert job.result(prepared, "report.json")["training"]["resumedAt"] == [STOP_AFTER]


def test_a_stop_before_the_last_step_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions)
    prepared = job.prepare()
    with pytest.raises(StepError, match=f"stopped after step {STEPS - 1}"):
        job.run("train", job.config(prepared), StopAfter(STEPS - 1))
    job.train(prepared)
    assert _weights(job, prepared) == uninterrupted


def test_three_stops_in_one_run_repeat_no_step_and_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions)
    prepared = job.prepare()
    for steps in (1, 1, 2):
        with pytest.raises(StepError, match="stopped after step"):
            job.run("train", job.config(prepared), StopAfter(steps))
    done = job.train(prepared)
    assert job.result(prepared, "report.json")["training"]["resumedAt"] == [1, 2, 4]
    assert _weights(job, prepared) == uninterrupted
    assert done.progress is not None
    assert done.progress.step == STEPS


def test_three_crashes_and_a_broken_checkpoint_cost_steps_but_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=2)
    prepared = job.prepare()
    checkpoints = job.output / prepared.run_id / "checkpoints"
    for steps, saved in ((1, set()), (3, {2}), (3, {2, 4})):  # they end at steps 1, 3 and 5
        with pytest.raises(RuntimeError, match="a crash"):
            job.run("train", job.config(prepared), CrashAfter(steps))
        assert {int(path.name[5:].partition(".")[0]) for path in checkpoints.glob("step-*")} == saved
    (optimizer,) = checkpoints.glob("step-4.*/optimizer.pt")
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    done = job.train(prepared)
    assert [text for text in done.warnings if "checkpoint of step 4 is skipped" in text and "optimizer.pt" in text]
    assert job.result(prepared, "report.json")["training"]["resumedAt"] == [2]
    assert _weights(job, prepared) == uninterrupted


@pytest.mark.parametrize("changes", [{}, {"packing": False, "groupByLength": True}, {"packing": False}])
def test_a_new_plan_with_half_the_micro_batch_goes_on_with_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, changes: dict[str, Any]
) -> None:
    """Without packing, 43 rows make three steps of an epoch, the last with fewer rows: it stops in the second one."""

    def adapter(*plans: int) -> dict[str, torch.Tensor]:
        batch = {"globalBatchSize": 16 if changes else 4}
        job = _job(tmp_path_factory, model_folder, instructions, **batch, **changes).change(lora={"dropout": 0.0})
        prepared = job.prepare()
        for micro_batch in plans[:-1]:
            with pytest.raises(StepError, match="stopped after"):
                job.run("train", job.config(prepared, micro_batch), StopAfter(STOP_AFTER + bool(changes)))
        job.train(prepared, micro_batch=plans[-1])
        return load(_weights(job, prepared))

    rows = 16 if changes else 4
    whole, replanned = adapter(rows), adapter(rows, rows // 2)
    for name, weight in whole.items():
        torch.testing.assert_close(replanned[name], weight, rtol=1e-3, atol=1e-4)


def test_saving_and_validating_on_the_way_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=2, loggingSteps=5)
    prepared = job.prepare()
    done = job.train(prepared)
    assert _weights(job, prepared) == uninterrupted
    assert done.progress is not None
    saved = done.progress.checkpoint
    assert saved is not None
    assert (saved.step, saved.bytes > 10_000) == (STEPS, True)


def test_another_seed_gives_another_adapter(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, seed=7)
    prepared = job.prepare()
    job.train(prepared)
    assert _weights(job, prepared) != uninterrupted


@pytest.mark.parametrize("save_steps", [4, 0])
def test_a_run_that_ended_before_its_upload_only_uploads(
    save_steps: int,
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    instructions: Path,
    uninterrupted: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=save_steps)
    prepared = job.prepare()
    with monkeypatch.context() as patched:
        patched.setattr("qlora_trainer.recipe.save_adapter", _lose_connection)
        with pytest.raises(ConnectionError):
            job.train(prepared)
    job.train(prepared)
    assert job.result(prepared, "report.json")["training"]["resumedAt"] == [STEPS]
    assert _weights(job, prepared) == uninterrupted


def _lose_connection(*_: Any) -> None:
    raise ConnectionError


# Real processes, with S3 behind a proxy that holds an upload until the signal is there


@pytest.fixture
def s3_job(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    instructions: Path,
    gateway: Gateway,
    faulty: FaultyS3,
) -> Job:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=2)
    return job.change(output={"uri": f"{gateway.bucket()}/out", "endpoint": faulty.endpoint})


def _start(job: Job, prepared: Prepared) -> subprocess.Popen[bytes]:
    paths = f"{ROOT}/operator:{ROOT}/trainer_image"
    # One thread, as here: with another number of them sums are rounded differently.
    env = os.environ | job.environment(job.config(prepared)) | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qlora_trainer", "train"]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(job: Job, prepared: Prepared) -> Storage:
    spec = job.config().spec
    return open_storage(spec.output.uri, spec.output, field="output.uri").within(prepared.run_id)


def _resume(job: Job, prepared: Prepared) -> tuple[bytes | None, list[int]]:
    """The adapter of the resumed run, and where it resumed. Checks that nothing else is left."""
    job.train(prepared)
    run = _run(job, prepared)
    assert {item.key.split("/")[0] for item in run.list()} == {
        *("adapter", "tensorboard", "manifest.json", "report.json", "report.html")
    }
    assert run.abort_uploads() == 0
    report = json.loads(run.read("report.json") or b"")
    return run.read("adapter/adapter_model.safetensors"), report["training"]["resumedAt"]


@pytest.mark.long
def test_sigkill_in_the_middle_of_an_upload(s3_job: Job, faulty: FaultyS3, uninterrupted: bytes) -> None:
    prepared = s3_job.prepare()
    with faulty.holding(r"^PUT .*/step-4\..*/optimizer\.pt") as arrived:
        process = _start(s3_job, prepared)
        assert arrived.wait(120)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    assert any("/step-4." in item.key for item in _run(s3_job, prepared).list())
    assert _resume(s3_job, prepared) == (uninterrupted, [2])


@pytest.mark.long
def test_sigterm_in_the_middle_of_an_upload(s3_job: Job, faulty: FaultyS3, uninterrupted: bytes) -> None:
    prepared = s3_job.prepare()
    with faulty.holding(r"^PUT .*/step-2\..*/optimizer\.pt") as arrived:
        process = _start(s3_job, prepared)
        assert arrived.wait(120)
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == ExitCode.INTERRUPTED
    report = RunReport.model_validate_json((s3_job.folder / "report.json").read_text())
    assert report.progress is not None
    assert report.progress.checkpoint is not None
    stopped = report.progress.step
    assert stopped == report.progress.checkpoint.step
    assert f"stopped after step {stopped} of {STEPS}; the checkpoint is in storage" in report.message
    assert _resume(s3_job, prepared) == (uninterrupted, [stopped])
