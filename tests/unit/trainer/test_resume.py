"""A run that is stopped and started again ends with the same adapter, to the bit, as one that wasn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.signals import StopSignal
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

STEPS, STOP_AFTER = 6, 3


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


def test_a_resumed_run_reports_the_base_model_s_loss_and_answers(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    report = job.result(prepared, "report.json")
    assert report["loss"]["evalBase"] is not None
    assert report["prompts"][0]["before"]


def test_a_resumed_run_says_where_it_resumed(resumed: tuple[Job, Prepared]) -> None:
    job, prepared = resumed
    assert job.result(prepared, "report.json")["training"]["resumedAt"] == [STOP_AFTER]


def test_saving_and_validating_on_the_way_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=2, loggingSteps=5)
    prepared = job.prepare()
    job.train(prepared)
    assert _weights(job, prepared) == uninterrupted


def test_another_seed_gives_another_adapter(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path, uninterrupted: bytes
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, seed=7)
    prepared = job.prepare()
    job.train(prepared)
    assert _weights(job, prepared) != uninterrupted


def test_a_run_that_ended_before_its_upload_only_uploads(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Path,
    instructions: Path,
    uninterrupted: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = _job(tmp_path_factory, model_folder, instructions, saveSteps=4)
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
