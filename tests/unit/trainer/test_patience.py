"""How long, and how often, a storage that fails is asked again. No time passes here but what is slept."""

from __future__ import annotations

import signal

import pytest

from qlora_trainer import patience
from qlora_trainer.patience import PatientStorage
from qlora_trainer.signals import StopSignal
from qlorajob.errors import ExitCode, Reason, StepError


class _Failing:
    """A storage that fails so many times; time passes only while somebody sleeps."""

    uri = "s3://bucket"

    def __init__(self, failures: float, code: ExitCode = ExitCode.TRANSIENT) -> None:
        self.failures, self.code = failures, code
        self.now, self.pauses, self.calls = 0.0, [], 0  # type: ignore[var-annotated]

    def read(self, key: str) -> bytes:
        self.calls += 1
        if self.calls > self.failures:
            return b"content"
        raise StepError(Reason.STORAGE_UNAVAILABLE, "down", code=self.code)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patiently(self, monkeypatch: pytest.MonkeyPatch, stop: StopSignal | None = None) -> PatientStorage:
        for module in ("qlora_trainer.patience", "qlora_trainer.signals"):
            monkeypatch.setattr(f"{module}.time", self)
        return PatientStorage(self, stop or StopSignal())  # type: ignore[arg-type]


def test_an_outage_of_a_minute_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _Failing(failures=float("inf"))
    patient = storage.patiently(monkeypatch)
    sleep = storage.sleep

    def heal_after_a_minute(seconds: float) -> None:
        sleep(seconds)
        if storage.now > 60:
            storage.failures = 0

    monkeypatch.setattr(storage, "sleep", heal_after_a_minute)
    assert patient.read("key") == b"content"
    assert storage.now < 60 + patience.LONGEST_PAUSE
    assert storage.calls < 12


def test_patience_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _Failing(failures=float("inf"))
    with pytest.raises(StepError, match="down"):
        storage.patiently(monkeypatch).read("key")
    assert patience.PATIENCE - patience.LONGEST_PAUSE <= storage.now <= patience.PATIENCE


def test_only_what_is_worth_waiting_for_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _Failing(failures=float("inf"))
    storage.patiently(monkeypatch)
    patient = PatientStorage(storage, StopSignal(), reasons={Reason.ENDPOINT_UNREACHABLE})  # type: ignore[arg-type]
    with pytest.raises(StepError, match="down"):
        patient.read("key")
    assert (storage.calls, storage.now) == (1, 0.0)


def test_no_two_processes_try_again_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for _ in range(2):
        storage = _Failing(failures=3)
        storage.patiently(monkeypatch).read("key")
        ends.append(storage.now)
    assert ends[0] != ends[1]


def test_what_stays_wrong_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = _Failing(failures=1, code=ExitCode.INVALID)
    with pytest.raises(StepError):
        storage.patiently(monkeypatch).read("key")
    assert storage.calls == 1


def test_a_stop_while_it_waits_leaves_one_last_try(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal()
    storage = _Failing(failures=float("inf"))
    patient = storage.patiently(monkeypatch, stop)
    sleep = storage.sleep

    def stop_after_a_minute(seconds: float) -> None:
        sleep(seconds)
        if storage.now > 60 and not stop.requested:
            with stop.deferred():
                stop._handle(signal.SIGTERM, None)

    monkeypatch.setattr(storage, "sleep", stop_after_a_minute)
    with pytest.raises(StepError):
        patient.read("key")
    assert 60 < storage.now <= 61 + stop.grace_seconds
