"""Weights are read while Python imports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_trainer import read_ahead as module
from qlora_trainer.model_source import weights_on_disk
from qlora_trainer.read_ahead import read_ahead
from tests.unit.trainer.jobs import Job


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with two files of weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "optimizer.bin"):
        (folder / name).write_bytes(bytes(1000))
    return folder


def test_files_are_read_to_their_ends(tmp_path: Path) -> None:
    pipes = [tmp_path / f"{number}.safetensors" for number in range(module.READERS + 2)]
    for pipe in pipes:
        os.mkfifo(pipe)
    readers = read_ahead(pipes)
    for pipe in pipes:
        with pipe.open("wb") as file:
            file.write(bytes(1 << 20))  # more than a pipe holds, so that writing ends only when somebody reads
    for reader in readers:
        reader.join(10)
    assert [reader.is_alive() for reader in readers] == [False] * module.READERS


def test_a_file_that_cannot_be_read_keeps_no_other_from_it(tmp_path: Path) -> None:
    (folder := tmp_path / "a-folder").mkdir()
    os.mkfifo(pipe := tmp_path / "pipe")
    (reader, _) = read_ahead([folder, pipe])
    pipe.write_bytes(bytes(1 << 20))
    reader.join(10)
    assert not reader.is_alive()


def test_more_than_memory_holds_is_not_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_memory", lambda: 1000)
    assert read_ahead([weights / "model-1.safetensors"]) == ()


def test_a_mounted_model_s_weights_are_on_disk(job: Job, weights: Path) -> None:
    prepared = job.prepare()
    settings = job.change(model={"uri": f"file://{weights}"}).settings(job.config(prepared))
    assert [path.name for path in weights_on_disk(settings)] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("uri", ["file:///nowhere", "s3://bucket/model", "hf://nobody/nothing"])
def test_a_model_that_is_elsewhere_has_nothing_on_disk(uri: str, job: Job) -> None:
    prepared = job.prepare()
    assert weights_on_disk(job.change(model={"uri": uri}).settings(job.config(prepared))) == ()


def test_what_was_fetched_from_s3_or_the_hub_is_found(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = job.prepare().model_copy(update={"model_revision": "0" * 40})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for uri, folder in (
        ("s3://bucket/model", job.folder / "work" / "models" / prepared.model_revision),
        ("hf://some/model@main", tmp_path / "hub" / "models--some--model" / "snapshots" / prepared.model_revision),
    ):
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()
        settings = job.change(model={"uri": uri}).settings(job.config(prepared))
        assert weights_on_disk(settings) == (folder / "model.safetensors",)
