"""Checkpoints in storage: what counts, what is kept, what is skipped, and who may write."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_trainer import patience
from qlora_trainer.artifacts import RunStore
from qlora_trainer.checkpoints import CheckpointStore
from qlora_trainer.patience import PatientStorage
from qlora_trainer.publication import PublishedElsewhere
from qlora_trainer.signals import MARGIN, StopSignal
from qlora_trainer.storage import LocalStorage, Storage, open_storage
from qlora_trainer.uploads import CheckpointUploads
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.spec import OutputSpec
from qlorajob.status import SavedCheckpoint
from tests.support.faulty_s3 import FaultyS3, error, hang_up
from tests.unit.trainer.gateway import Gateway
from tests.unit.trainer.jobs import a_manifest

RUN = "run1"


@pytest.fixture
def warnings() -> list[str]:
    """What a user is told."""
    return []


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(LocalStorage(tmp_path / "output", "file:///output"), RUN)


def _folder(tmp_path: Path, step: int, content: str = "") -> Path:
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_text(content or f"step {step}")
    return folder


@pytest.fixture
def checkpoints(store: RunStore, tmp_path: Path, warnings: list[str]) -> CheckpointStore:
    """Three checkpoints, of which two are kept."""
    checkpoints = CheckpointStore(store, keep=2, warn=warnings.append)
    for step in (2, 4, 10):
        checkpoints.save(_folder(tmp_path, step), step)
    return checkpoints


def _key(store: RunStore, step: int, name: str) -> str:
    return next(item.key for item in store.storage.list(f"checkpoints/step-{step}.") if item.key.endswith(f"/{name}"))


def _restored(checkpoints: CheckpointStore, tmp_path: Path) -> str | None:
    folder = checkpoints.restore_newest(tmp_path / "restored")
    return (folder / "state").read_text() if folder else None


# What counts, and what is kept


def test_only_the_newest_checkpoints_are_kept(checkpoints: CheckpointStore, store: RunStore) -> None:
    assert [found.step for found in checkpoints.whole()] == [10, 4]
    assert {item.key.split(".")[0] for item in store.storage.list("checkpoints/")} == {
        "checkpoints/step-4",
        "checkpoints/step-10",
    }


def test_the_newest_checkpoint_is_restored_under_transformers_name(
    checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    folder = checkpoints.restore_newest(tmp_path / "restored")
    assert folder is not None
    assert (folder.name, (folder / "state").read_text()) == ("checkpoint-10", "step 10")


def test_what_was_saved_is_told(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=iter((10.0, 12.5)).__next__)
    monkeypatch.setattr("qlora_trainer.checkpoints.time", clock)
    saved = CheckpointStore(store, keep=1, warn=print).save(_folder(tmp_path, 7), 7)
    assert (saved.step, saved.bytes, saved.seconds) == (7, len("step 7"), 2.5)


def test_without_a_checkpoint_there_is_nothing_to_restore(store: RunStore, tmp_path: Path, warnings: list[str]) -> None:
    assert _restored(CheckpointStore(store, keep=2, warn=warnings.append), tmp_path) is None
    assert warnings == []


def test_deleting_all_checkpoints_leaves_the_rest(checkpoints: CheckpointStore, store: RunStore) -> None:
    store.storage.write("report.json", b"{}")
    checkpoints.delete_all()
    assert [item.key for item in store.storage.list()] == ["report.json"]


# What is skipped


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        pytest.param("manifest.json", None, None, id="no manifest"),
        pytest.param("manifest.json", b"{}", "its manifest can't be read", id="broken manifest"),
        pytest.param(
            "manifest.json", b'{"runId": "run1", "step": 9, "files": []}', "it is of run run1, step 9", id="other step"
        ),
        pytest.param("manifest.json", b'{"runId": "run2", "step": 10, "files": []}', "it is of run run2", id="foreign"),
        pytest.param("state", None, "is missing", id="file missing"),
        pytest.param("state", b"stap 10", "isn't the file that was uploaded", id="file changed"),
        pytest.param("state", b"step", "isn't the file that was uploaded", id="file cut"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_skipped_and_the_user_told(
    checkpoints: CheckpointStore,
    store: RunStore,
    tmp_path: Path,
    warnings: list[str],
    name: str,
    content: bytes | None,
    told: str | None,
) -> None:
    key = _key(store, 10, name)
    store.storage.delete([key]) if content is None else store.storage.write(key, content)
    assert _restored(checkpoints, tmp_path) == "step 4"
    assert [text for text in warnings if "checkpoint of step 10 is skipped" in text and told in text] == warnings
    assert len(warnings) == (0 if told is None else 1)


def test_when_none_is_whole_training_starts_anew(
    checkpoints: CheckpointStore, store: RunStore, tmp_path: Path, warnings: list[str]
) -> None:
    for step in (4, 10):
        store.storage.write(_key(store, step, "state"), b"broken")
    assert _restored(checkpoints, tmp_path) is None
    assert len(warnings) == 2


def test_a_broken_checkpoint_does_not_take_the_place_of_those_that_follow(
    checkpoints: CheckpointStore, store: RunStore, tmp_path: Path, warnings: list[str]
) -> None:
    """It has the higher step: were it kept, each new one would be dropped as soon as it is saved."""
    alone = CheckpointStore(store, keep=1, warn=warnings.append)
    store.storage.write(_key(store, 10, "state"), b"broken")
    assert _restored(alone, tmp_path) == "step 4"
    alone.save(_folder(tmp_path, 6), 6)
    assert [found.step for found in alone.whole()] == [6]
    assert _restored(CheckpointStore(store, keep=1, warn=pytest.fail), tmp_path) == "step 6"


def test_what_a_killed_process_left_half_done_is_swept_away(checkpoints: CheckpointStore, store: RunStore) -> None:
    store.storage.write("checkpoints/step-12.0badcafe/state", b"half")
    store.storage.delete([_key(store, 10, "manifest.json")])
    checkpoints.sweep()
    assert {item.key.split(".")[0] for item in store.storage.list()} == {"checkpoints/step-4"}


# Two processes of one run


def test_a_stale_process_cannot_spoil_its_successor_s_checkpoint(store: RunStore, tmp_path: Path) -> None:
    stale, current = (CheckpointStore(store, keep=3, warn=print) for _ in range(2))
    current.save(_folder(tmp_path / "current", 5, "current's"), 5)
    stale.save(_folder(tmp_path / "stale", 5, "stale's"), 5)
    assert len(current.whole()) == 2
    assert _restored(current, tmp_path) in ("current's", "stale's")


def test_a_checkpoint_that_is_pruned_while_it_is_read_makes_way_for_a_newer_one(
    checkpoints: CheckpointStore, store: RunStore, tmp_path: Path, warnings: list[str]
) -> None:
    other = CheckpointStore(store, keep=1, warn=print)

    class Slow(LocalStorage):
        """Between the list and the first read, another process saves and prunes."""

        def read(self, key: str) -> bytes | None:
            if not (tmp_path / "late").exists():
                other.save(_folder(tmp_path / "late", 20), 20)
            return super().read(key)

    slow = RunStore(LocalStorage(tmp_path / "output", "file:///output"), RUN)
    slow.storage = Slow(tmp_path / "output" / RUN, f"file:///output/{RUN}")
    assert _restored(CheckpointStore(slow, keep=2, warn=warnings.append), tmp_path) == "step 20"


# S3


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses in which a test can wait."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.05)


def _s3(proxy: FaultyS3, bucket: str, *, seconds: float = 30, stop: StopSignal | None = None) -> RunStore:
    output = OutputSpec.model_validate({"uri": bucket, "endpoint": proxy.endpoint})
    storage: Storage = open_storage(f"{bucket}/out", output, field="output.uri")
    return RunStore(PatientStorage(storage, stop or StopSignal(), seconds=seconds), RUN)


@pytest.fixture
def s3(gateway: Gateway, faulty: FaultyS3, quick: None) -> RunStore:
    return _s3(faulty, gateway.bucket())


def test_an_endpoint_that_is_down_is_no_reason_to_skip_a_checkpoint(
    s3: RunStore, faulty: FaultyS3, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointStore(s3, keep=2, warn=warnings.append)
    for step in (2, 4):
        checkpoints.save(_folder(tmp_path, step), step)
    faulty.inject(error(503, "ServiceUnavailable"), r"^(GET|HEAD) .*step-4\.[0-9a-f]+/state", times=10)
    assert _restored(checkpoints, tmp_path) == "step 4"
    assert warnings == []


def test_when_patience_ends_the_restore_fails_instead_of_starting_anew(
    gateway: Gateway, faulty: FaultyS3, quick: None, tmp_path: Path, warnings: list[str]
) -> None:
    impatient = CheckpointStore(_s3(faulty, gateway.bucket(), seconds=0.2), keep=2, warn=warnings.append)
    impatient.save(_folder(tmp_path, 2), 2)
    faulty.inject(hang_up, r"^(GET|HEAD) .*/state")
    with pytest.raises(StepError) as failed:
        _restored(impatient, tmp_path)
    assert (failed.value.code, warnings) == (ExitCode.TRANSIENT, [])


def test_old_checkpoints_go_only_after_the_new_one_is_whole(
    gateway: Gateway, faulty: FaultyS3, quick: None, tmp_path: Path
) -> None:
    impatient = CheckpointStore(_s3(faulty, gateway.bucket(), seconds=0.2), keep=1, warn=print)
    impatient.save(_folder(tmp_path, 2), 2)
    faulty.inject(error(500, "InternalError"), r"^PUT .*step-4\..*manifest.json")
    with pytest.raises(StepError):
        impatient.save(_folder(tmp_path, 4), 4)
    assert [found.step for found in impatient.whole()] == [2]
    faulty.heal()
    impatient.save(_folder(tmp_path, 6), 6)
    assert [found.step for found in impatient.whole()] == [6]


def test_checkpoints_that_can_not_be_deleted_do_no_harm(
    gateway: Gateway, faulty: FaultyS3, quick: None, tmp_path: Path
) -> None:
    checkpoints = CheckpointStore(_s3(faulty, gateway.bucket()), keep=1, warn=print)
    faulty.inject(error(403, "AccessDenied"), r"^(DELETE|POST) ")
    for step in (2, 4):
        checkpoints.save(_folder(tmp_path, step), step)
    assert [found.step for found in checkpoints.whole()] == [4, 2]


# Uploads beside the training


class Training:
    """What a training does with its uploads: submit checkpoints, and other things between."""

    def __init__(self, checkpoints: CheckpointStore, stop: StopSignal, folder: Path) -> None:
        self.told: list[SavedCheckpoint] = []
        self.checkpoints, self.stop, self._folder = checkpoints, stop, folder
        self.uploads = CheckpointUploads(checkpoints, stop, self.told.append)

    def run(self, *events: int | Callable[[], object]) -> None:
        """A number is a step whose checkpoint is submitted."""
        with self.uploads:
            for event in events:
                if isinstance(event, int):
                    self.uploads.submit(_folder(self._folder, event), event)
                else:
                    event()

    def step(self) -> None:
        """The end of a step, some time after the last upload."""
        upload = self.uploads._under_way
        assert upload is not None
        upload.exception()
        self.uploads.check()

    def stop_it(self) -> None:
        """SIGTERM."""
        with self.stop.deferred():
            self.stop._handle(signal.SIGTERM, None)

    def fail(self) -> None:
        raise MemoryError

    def saved(self) -> list[int]:
        return [found.step for found in self.checkpoints.whole()]


@pytest.fixture
def training(gateway: Gateway, faulty: FaultyS3, quick: None, tmp_path: Path) -> Training:
    stop = StopSignal()
    store = _s3(faulty, gateway.bucket(), seconds=0.2, stop=stop)
    return Training(CheckpointStore(store, keep=5, warn=print), stop, tmp_path)


def test_training_goes_on_while_a_checkpoint_is_uploaded(training: Training, faulty: FaultyS3, tmp_path: Path) -> None:
    under_way = []

    def step() -> None:
        assert arrived.wait(10)
        training.uploads.check()
        under_way.append((tmp_path / "checkpoint-2").exists())

    with contextlib.ExitStack() as stack:
        arrived = stack.enter_context(faulty.holding("^PUT"))
        training.run(2, step, stack.close)
    assert under_way == [True]
    assert [saved.step for saved in training.told] == training.saved() == [2]
    assert not (tmp_path / "checkpoint-2").exists()


def test_there_is_one_upload_at_a_time_and_in_order(training: Training, faulty: FaultyS3) -> None:
    training.run(2, 4, 6)
    order = [match[1] for request in faulty.requests if (match := re.match(r"PUT .*/step-(\d)\.", request))]
    assert order == ["2", "2", "4", "4", "6", "6"]


def test_a_failed_upload_surfaces_at_the_next_one_as_transient(training: Training, faulty: FaultyS3) -> None:
    faulty.inject(error(500, "InternalError"), "^PUT")
    with pytest.raises(StepError, match="InternalError") as failed:
        training.run(2, training.step, 4, training.fail)
    assert failed.value.code is ExitCode.TRANSIENT


def test_a_failed_upload_surfaces_at_the_end(training: Training, faulty: FaultyS3) -> None:
    faulty.inject(error(500, "InternalError"), "^PUT")
    with pytest.raises(StepError, match="InternalError"):
        training.run(2)


def test_an_upload_that_is_refused_ends_training_at_the_next_step(training: Training, faulty: FaultyS3) -> None:
    faulty.inject(error(403, "AccessDenied"), "^PUT")
    with pytest.raises(StepError) as refused:
        training.run(2, training.step, training.fail)
    assert (refused.value.reason, refused.value.code) == (Reason.ACCESS_DENIED, ExitCode.INVALID)
    assert refused.value.field == "output.credentialsSecretRef"


def test_the_first_error_of_training_is_not_hidden_by_an_upload_s(training: Training, faulty: FaultyS3) -> None:
    faulty.inject(error(500, "InternalError"), "^PUT")
    with pytest.raises(MemoryError):
        training.run(2, training.fail)


def test_an_error_of_training_waits_for_the_upload(training: Training) -> None:
    with pytest.raises(MemoryError):
        training.run(2, training.fail)
    assert training.saved() == [2]


def test_a_stop_after_a_failed_upload_still_saves_its_own_checkpoint(training: Training, faulty: FaultyS3) -> None:
    faulty.inject(error(500, "InternalError"), r"^PUT .*step-2\.")
    training.run(2, training.stop_it, 3)
    assert training.saved() == [3]


def test_a_stop_whose_checkpoint_can_not_be_saved_is_still_a_stop_and_says_so(
    training: Training, faulty: FaultyS3
) -> None:
    faulty.inject(hang_up, "^PUT")
    with pytest.raises(StepError, match="newest checkpoint isn't in storage") as ended:
        training.run(training.stop_it, 2)
    assert (ended.value.reason, ended.value.code) == (Reason.INTERRUPTED, ExitCode.INTERRUPTED)


def test_patience_ends_with_the_grace_period(gateway: Gateway, faulty: FaultyS3, quick: None, tmp_path: Path) -> None:
    stop = StopSignal()
    stop.grace_seconds = MARGIN + 0.5
    training = Training(
        CheckpointStore(_s3(faulty, gateway.bucket(), seconds=3600, stop=stop), keep=5, warn=print), stop, tmp_path
    )
    faulty.inject(hang_up, "^PUT")
    with pytest.raises(StepError, match="newest checkpoint isn't in storage"):
        training.run(2, training.stop_it)


def test_a_run_that_another_process_published_stops(store: RunStore, tmp_path: Path) -> None:
    store.publish(a_manifest(RUN))
    with pytest.raises(PublishedElsewhere):
        Training(CheckpointStore(store, keep=2, warn=print), StopSignal(), tmp_path).run(2)
    assert [item.key for item in store.storage.list()] == ["manifest.json"]


def test_a_manifest_tells_the_files_and_the_run(checkpoints: CheckpointStore, store: RunStore) -> None:
    manifest = json.loads(store.storage.read(_key(store, 10, "manifest.json")) or b"")
    assert (manifest["runId"], manifest["step"]) == (RUN, 10)
    assert [file["path"] for file in manifest["files"]] == [_key(store, 10, "state")]
