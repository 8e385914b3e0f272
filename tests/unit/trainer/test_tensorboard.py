"""The event file for TensorBoard: what it shows, and how it grows in storage while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.artifacts import RunStore
from qlora_trainer.journal import Journal
from qlora_trainer.storage import LocalStorage
from qlora_trainer.tensorboard import LiveCurves, events
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import EVENTS
from tests.support.events import scalars


def point(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1000.0 + step,
        "loss": 3 - step / 10,
        "learningRate": 2e-4 / step,
        "gradNorm": 0.5,
        "tokensPerSecond": 100.0 * step,
    }


def a_journal(steps: int) -> Journal:
    curve = [point(step) for step in range(1, steps + 1)]
    evaluations = [{"step": step, "time": 1000.5 + step, "evalLoss": 2 - step / 10} for step in range(2, steps + 1, 2)]
    return Journal(base_eval_loss=2.5, curve=curve, evaluations=evaluations)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(LocalStorage(tmp_path, f"file://{tmp_path}"), "run1")


def shown(store: RunStore, tmp_path: Path) -> list[int]:
    """Steps of the loss, as TensorBoard reads them from storage."""
    folder = tmp_path / "read"
    store.storage.download(EVENTS, folder / Path(EVENTS).name)
    return [step for step, _ in scalars(folder)["train/loss"]]


def test_every_value_of_the_journal_is_a_scalar_under_the_name_that_transformers_gives_it(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.qlora").write_bytes(events(a_journal(4)))
    found = scalars(tmp_path)
    assert set(found) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "eval/loss",
    }
    assert found["train/loss"] == [(step, pytest.approx(3 - step / 10)) for step in (1, 2, 3, 4)]
    assert found["train/learning_rate"][3] == (4, pytest.approx(5e-5))
    assert found["eval/loss"] == [(0, 2.5), (2, pytest.approx(1.8)), (4, pytest.approx(1.6))]


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    journal = Journal(curve=[point(1) | {"gradNorm": None}])
    (tmp_path / "events.out.tfevents.qlora").write_bytes(events(journal))
    assert set(scalars(tmp_path)) == {"train/loss", "train/learning_rate", "train/tokens_per_second"}


def test_the_file_only_grows_so_that_a_reader_can_follow_it() -> None:
    assert events(a_journal(6)).startswith(events(a_journal(3)))


def test_a_run_is_seen_while_it_goes_on(store: RunStore, tmp_path: Path) -> None:
    journal = a_journal(2)
    curves = LiveCurves(store, journal)
    curves.upload()
    assert shown(store, tmp_path) == [1, 2]
    journal.curve.append(point(3))
    curves.upload()
    assert shown(store, tmp_path) == [1, 2, 3]


def test_a_resumed_run_goes_on_from_its_checkpoint_in_the_same_file(store: RunStore, tmp_path: Path) -> None:
    LiveCurves(store, a_journal(5)).upload()
    LiveCurves(store, a_journal(3)).upload()  # the checkpoint was of step 3
    assert shown(store, tmp_path) == [1, 2, 3]


def test_a_process_that_was_given_up_does_not_touch_published_results(store: RunStore, tmp_path: Path) -> None:
    lost = LiveCurves(store, a_journal(1))
    lost.upload()
    store.write_file(EVENTS, events(a_journal(4)))
    lost.upload()
    lost.upload()
    assert shown(store, tmp_path) == [1, 2, 3, 4]


def test_a_run_goes_on_without_its_live_curves(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = LiveCurves(store, a_journal(1))

    def down(*_: Any, **__: Any) -> str:
        raise StepError(Reason.STORAGE_UNAVAILABLE, "the bucket is down", code=ExitCode.TRANSIENT)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", down)
        curves.upload()
    curves.upload()
    assert store.storage.read(EVENTS) == events(a_journal(1))
