"""How a process ends: exit code, report, logs."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_trainer import logs
from qlora_trainer.__main__ import _report as report_on
from qlora_trainer.__main__ import diagnose
from qlora_trainer.context import Outcome
from qlora_trainer.settings import Settings, arrange_environment, usable_cpus
from qlora_trainer.signals import Stopped, StopSignal
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.run import WARNING_LENGTH, RunReport
from tests.unit.trainer.jobs import Job

ROOT = Path(__file__).parents[3]


class OutOfMemoryError(RuntimeError):
    """As torch.cuda's is called."""


class EndpointConnectionError(Exception):
    """As botocore's, with a text that nobody should read."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (StepError(Reason.MODEL_NOT_FOUND, "x", field="model.uri"), ExitCode.INVALID, Reason.MODEL_NOT_FOUND),
        (Stopped(), ExitCode.INTERRUPTED, Reason.INTERRUPTED),
        (OutOfMemoryError("CUDA out of memory. Tried"), ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (MemoryError(), ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left"), ExitCode.TRANSIENT, Reason.DISK_FULL),
        (OSError(errno.EDQUOT, "Quota exceeded"), ExitCode.TRANSIENT, Reason.DISK_FULL),
        (ConnectionResetError("reset"), ExitCode.TRANSIENT, Reason.STORAGE_UNAVAILABLE),
        (EndpointConnectionError("AKIA"), ExitCode.TRANSIENT, Reason.STORAGE_UNAVAILABLE),
        (ValueError("a bug"), ExitCode.TRANSIENT, Reason.INTERNAL_ERROR),
    ],
)
def test_every_error_has_a_code_and_a_reason(error: BaseException, code: ExitCode, reason: Reason) -> None:
    end = diagnose(error, "train")
    assert (end.code, end.reason) == (code, reason)


def test_a_network_library_s_words_stay_out_of_the_message() -> None:
    assert "AKIA" not in diagnose(EndpointConnectionError("AKIA"), "train").message


def test_a_full_disk_names_the_field() -> None:
    assert diagnose(OSError(errno.ENOSPC, "x"), "train").field == "resources.ephemeralStorage"


def test_a_full_cache_volume_names_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_MOUNT_ROOT", str(tmp_path))
    error = OSError(errno.ENOSPC, "x", str(tmp_path / "cache" / "models" / "weights"))
    assert diagnose(error, "prepare").field == "model.cacheClaim"


def _save_with_torch(path: str) -> None:
    torch.save({"state": torch.zeros(1000)}, path)


def _save_with_python(path: str) -> None:
    with Path(path).open("wb") as file:
        file.write(bytes(100_000))


@pytest.mark.parametrize("save", [_save_with_torch, _save_with_python])
def test_a_disk_that_is_full_is_told_whatever_a_library_makes_of_it(
    save: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_WORK_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))  # as it is when a file was cut there
    with pytest.raises((OSError, RuntimeError)) as failed:
        save("/dev/full")
    assert diagnose(failed.value, "train").reason is Reason.DISK_FULL


def test_safetensors_words_for_a_full_disk_are_known() -> None:
    said = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert diagnose(said, "train").reason is Reason.DISK_FULL


def test_torch_s_writer_may_fail_on_a_disk_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_WORK_DIR", str(tmp_path))
    with pytest.raises(RuntimeError) as failed:
        _save_with_torch("/dev/full")
    assert diagnose(failed.value, "train").reason is Reason.INTERNAL_ERROR


def test_a_stop_is_raised_at_once() -> None:
    with pytest.raises(Stopped):
        StopSignal()._handle(signal.SIGTERM, None)


def test_a_second_stop_is_not_raised_again() -> None:
    stop = StopSignal()
    stop.requested = True
    stop._handle(signal.SIGTERM, None)
    assert stop.requested


def test_a_deferred_stop_is_only_remembered() -> None:
    stop = StopSignal()
    with stop.deferred():
        stop._handle(signal.SIGTERM, None)
    assert stop.requested


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root makes a process 1")
def test_process_1_of_a_container_can_be_stopped_while_it_imports() -> None:
    """Without a handler the kernel drops the signal, and the pod goes on until its grace period ends."""
    script = "import qlora_trainer, time; print('imports', flush=True); time.sleep(60)"
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as outside:
        assert outside.stdout is not None
        assert outside.stdout.readline() == "imports\n"
        (inside,) = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(inside), signal.SIGTERM)
        assert outside.wait(30) == ExitCode.INTERRUPTED


def test_a_log_line_is_json_with_the_job_s_key() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "step %d", (3,), None)
    record.loss = 2.5
    line = json.loads(logs.JsonFormatter({"job": "team/codes", "step": "train"}).format(record))
    assert (line["message"], line["job"], line["step"], line["loss"]) == ("step 3", "team/codes", "train", 2.5)


def test_a_log_line_hides_secrets_in_messages_and_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "top-secret-value")
    try:
        raise ValueError("signed with top-secret-value")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "top-secret-value", (), sys.exc_info())
    assert "top-secret-value" not in logs.JsonFormatter({}).format(record)


def test_every_cache_is_below_the_work_folder(job: Job) -> None:
    env: dict[str, str] = {}
    arrange_environment(env, job.settings())
    work = str(job.folder / "work")
    assert all(env[name].startswith(work) for name in ("HF_HOME", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR"))


def test_a_mounted_cache_claim_holds_the_weights(job: Job) -> None:
    cache = job.folder / "mounts" / "cache"
    cache.mkdir(parents=True)
    env: dict[str, str] = {}
    arrange_environment(env, job.change(model={"cacheClaim": "weights"}).settings())
    assert env["HF_HOME"] == str(cache)
    # The kernels too, so that the next pod starts faster.
    assert env["TRITON_CACHE_DIR"] == str(cache / "compiled" / "triton")
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "compiled" / "inductor")


def test_a_cache_claim_that_is_read_only_still_gives_the_weights(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = job.folder / "mounts" / "cache"
    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != cache)  # which root always may
    env: dict[str, str] = {}
    settings = job.change(model={"cacheClaim": "weights"}).settings()
    arrange_environment(env, settings)
    assert env["HF_HOME"] == str(cache)
    assert env["TRITON_CACHE_DIR"] == str(settings.work_dir / "triton")


def test_at_least_one_cpu_is_usable() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_a_broken_run_config_is_an_invalid_spec() -> None:
    with pytest.raises(StepError, match="QLORA_RUN_CONFIG: spec: Field required") as refused:
        Settings.from_env({"QLORA_RUN_CONFIG": '{"namespace": "", "name": "x", "key": ""}'})
    assert refused.value.reason is Reason.INVALID_SPEC


def _start(job: Job, step: str) -> subprocess.Popen[str]:
    env = {**os.environ, **job.environment(job.config()), "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image"}
    command = [sys.executable, "-m", "qlora_trainer", step]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _report(job: Job) -> RunReport:
    return RunReport.model_validate_json((job.folder / "report.json").read_text())


def test_a_refusal_is_reported_with_reason_field_and_message(job: Job) -> None:
    process = _start(job.change(resources={"gpuClass": None, "gpus": 2}), "prepare")
    assert process.wait(timeout=120) == ExitCode.INVALID
    report = _report(job)
    assert (report.reason, report.field) == (Reason.UNSUPPORTED, "resources.gpus")
    assert report.message.startswith("resources.gpus: ")


def test_a_process_that_is_asked_to_stop_says_so(job: Job) -> None:
    process = _start(job, "prepare")
    assert process.stdout is not None
    assert "output done" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == ExitCode.INTERRUPTED
    assert _report(job).reason is Reason.INTERRUPTED


def test_a_report_tells_the_newest_warnings_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "top-secret-value")
    outcome = Outcome()
    for number in range(7):
        outcome.warn(f"{number} top-secret-value " + "x" * 300)
    told = report_on("train", outcome, ExitCode.DONE, Reason.SUCCEEDED, "", None)
    assert [text[:6] for text in told.warnings] == [f"{number} *** " for number in range(2, 7)]
    assert {len(text) for text in told.warnings} == {WARNING_LENGTH}


def test_half_a_character_in_an_error_leaves_the_report_and_the_log_whole() -> None:
    told = report_on("train", Outcome(), ExitCode.INVALID, Reason.MODEL_INVALID, "there is no caf\udce9.bin", None)
    assert RunReport.model_validate_json(told.to_json()).message == "there is no caf?.bin"
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "there is no caf\udce9.bin", (), None)
    assert json.loads(logs.JsonFormatter({}).format(record))["message"] == "there is no caf?.bin"


def test_a_secret_is_hidden_where_a_library_has_cut_its_line_end_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_made_with_echo\n")
    assert logs.redact("Authorization: Bearer hf_made_with_echo") == "Authorization: Bearer ***"


def test_an_unknown_command_prints_the_usage(job: Job) -> None:
    process = _start(job, "fine-tune")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INVALID
    assert "usage: python -m qlora_trainer prepare|train|merge" in output
