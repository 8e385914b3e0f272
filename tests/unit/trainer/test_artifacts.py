"""The run's prefix: trees, manifests, latest.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.artifacts import PROBE, RunStore, check_output
from qlora_trainer.storage import LocalStorage
from qlorajob.errors import ExitCode, StepError
from qlorajob.manifest import Latest
from tests.unit.trainer.jobs import a_manifest


@pytest.fixture
def output(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "output", "file:///output")


@pytest.fixture
def store(output: LocalStorage) -> RunStore:
    return RunStore(output, "run1")


def _tree(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_the_output_check_leaves_nothing_behind(output: LocalStorage) -> None:
    check_output(output)
    assert output.read(PROBE) is None


def test_a_tree_is_listed_with_its_digests(store: RunStore, tmp_path: Path) -> None:
    (file,) = store.upload_tree(_tree(tmp_path / "a", weights="abc"), "adapter")
    assert (file.path, file.bytes) == ("adapter/weights", 3)
    assert file.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_uploading_again_drops_what_is_no_longer_there(store: RunStore, tmp_path: Path) -> None:
    store.upload_tree(_tree(tmp_path / "a", old="x", both="x"), "adapter")
    store.upload_tree(_tree(tmp_path / "b", both="y"), "adapter")
    assert [item.key for item in store.storage.list()] == ["adapter/both"]


def test_a_run_without_a_manifest_is_not_done(store: RunStore) -> None:
    assert store.manifest() is None


def test_a_run_with_its_manifest_and_files_is_done(store: RunStore, tmp_path: Path) -> None:
    manifest = a_manifest(files=store.upload_tree(_tree(tmp_path / "a", weights="abc"), "adapter"))
    store.publish(manifest)
    assert store.manifest() == manifest


def test_a_run_whose_file_is_gone_is_not_done(store: RunStore, tmp_path: Path) -> None:
    store.publish(a_manifest(files=store.upload_tree(_tree(tmp_path / "a", weights="abc"), "adapter")))
    store.storage.delete(["adapter/weights"])
    assert store.manifest() is None


def test_a_run_whose_file_is_cut_is_not_done(store: RunStore, tmp_path: Path) -> None:
    store.publish(a_manifest(files=store.upload_tree(_tree(tmp_path / "a", weights="abc"), "adapter")))
    store.storage.write("adapter/weights", b"ab")
    assert store.manifest() is None


def test_a_manifest_that_cannot_be_read_does_not_count(store: RunStore) -> None:
    store.storage.write("manifest.json", b'{"runId":')
    assert store.manifest() is None


def test_a_downloaded_file_must_have_the_digest(store: RunStore, tmp_path: Path) -> None:
    files = store.upload_tree(_tree(tmp_path / "a", weights="abc"), "adapter")
    store.storage.write("adapter/weights", b"abd")
    with pytest.raises(StepError, match="SHA-256 differs") as refused:
        store.download_tree(files, "adapter", tmp_path / "b")
    assert refused.value.code is ExitCode.TRANSIENT


def _latest(output: LocalStorage) -> str | None:
    content = output.read("latest.json")
    return Latest.model_validate_json(content).run_id if content else None


def test_latest_points_to_the_newer_run(output: LocalStorage) -> None:
    RunStore(output, "old").point_latest(a_manifest("old", age=2))
    RunStore(output, "new").point_latest(a_manifest("new", age=1))
    assert _latest(output) == "new"


def test_latest_does_not_go_back_to_an_older_run(output: LocalStorage) -> None:
    RunStore(output, "new").point_latest(a_manifest("new", age=1))
    RunStore(output, "old").point_latest(a_manifest("old", age=2))
    assert _latest(output) == "new"


def test_two_runs_that_end_at_the_same_time_leave_the_newer_one(output: LocalStorage) -> None:
    class Slow(LocalStorage):
        """Between look and write, the newer run has its say."""

        def read(self, key: str) -> bytes | None:
            found = super().read(key)
            if found is None:
                RunStore(output, "new").point_latest(a_manifest("new", age=1))
            return found

    RunStore(Slow(output._root, output.uri), "old").point_latest(a_manifest("old", age=2))
    assert _latest(output) == "new"


def test_a_run_that_failed_its_gate_is_never_latest(output: LocalStorage) -> None:
    RunStore(output, "bad").point_latest(a_manifest("bad", promoted=False))
    assert _latest(output) is None
