"""The merge command: what it writes, what it keeps on disk, and what it asks the merged model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer import checkpoint_files, merge, storage
from qlora_trainer.settings import usable_memory
from qlora_trainer.signals import Stopped
from qlorajob.errors import Reason
from qlorajob.manifest import ArtifactManifest
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

SMALL_SHARD = 60_000
"""Bytes; the tiny model takes several."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, instructions: Path) -> tuple[Job, Prepared]:
    """A trained adapter that several tests merge, each in its own way."""
    job = Job(tmp_path_factory.mktemp("merge"), model_folder, instructions)
    job.change(evaluation={"prompts": ["code of zulu ="], "maxNewTokens": 4})
    prepared = job.prepare()
    job.train(prepared)
    return job, prepared


class Merged:
    """A job whose adapter is there, and its merge."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.job, self.prepared = job, prepared
        self.folder = job.output / prepared.run_id

    def run(self, **change: Any) -> Merged:
        """Merge."""
        self.job.change(merge={"enabled": True} | change)
        self.job.run("merge", self.job.config(self.prepared))
        return self

    @property
    def report(self) -> dict[str, Any]:
        return self.job.result(self.prepared, "report.json")  # type: ignore[no-any-return]

    @property
    def manifest(self) -> ArtifactManifest:
        return ArtifactManifest.model_validate_json((self.folder / "manifest.json").read_bytes())

    def scratch(self) -> set[str]:
        """What is left of the weights in the pod's work folder."""
        return {path.name for path in (self.job.folder / "work" / "merged").glob("*.safetensors")}


@pytest.fixture
def merged(trained: tuple[Job, Prepared], monkeypatch: pytest.MonkeyPatch) -> Iterator[Merged]:
    """The trained job, as if it had never been merged before. Shards are small."""
    job, prepared = trained
    monkeypatch.setattr(checkpoint_files.plan_shards, "__defaults__", (SMALL_SHARD,))
    spec, folder = deepcopy(job.spec), job.output / prepared.run_id
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    yield Merged(job, prepared)
    job.spec = spec
    for path, content in before.items():
        path.write_bytes(content)


def test_a_large_model_is_written_in_several_files_with_an_index(merged: Merged) -> None:
    from transformers import AutoModelForCausalLM

    folder = merged.run().folder / "merged"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    assert all((folder / name).stat().st_size < 2 * SMALL_SHARD for name in files)
    assert set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(files)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]


def test_the_manifest_lists_the_merged_files_as_they_are(merged: Merged) -> None:
    merged.run()
    listed = {file.path: file for file in merged.manifest.files if file.path.startswith("merged/")}
    there = {path.relative_to(merged.folder).as_posix() for path in (merged.folder / "merged").rglob("*")}
    assert set(listed) == there
    for path, file in listed.items():
        assert hashlib.sha256((merged.folder / path).read_bytes()).hexdigest() == file.sha256


def test_config_tokenizer_and_chat_template_belong_to_the_merged_model(merged: Merged) -> None:
    from transformers import AutoTokenizer

    folder = merged.run(dtype="float16").folder / "merged"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    assert (folder / "generation_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.pad_token == tokenizer.eos_token


def test_files_of_an_earlier_try_are_gone(merged: Merged) -> None:
    stale = merged.folder / "merged" / "model-00009-of-00009.safetensors"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"from a pod that was killed")
    merged.run()
    assert not stale.exists()


def test_parts_of_uploads_that_failed_are_dropped(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, torn = storage.LocalStorage.upload, merged.folder / f".model.safetensors.1{storage.UNFINISHED}"

    def leaving_parts(self: storage.LocalStorage, path: Path, *args: Any, **options: Any) -> str:
        torn.write_bytes(b"half")
        return upload(self, path, *args, **options)

    monkeypatch.setattr(storage.LocalStorage, "upload", leaving_parts)
    merged.run()
    assert not torn.exists()


def test_another_type_is_another_merge(merged: Merged) -> None:
    first = merged.run().manifest.artifacts.merged
    second = merged.run(dtype="float16").manifest.artifacts.merged
    assert first is not None
    assert second is not None
    assert first.digest != second.digest


def test_the_merged_model_answers_where_it_fits_into_memory(merged: Merged) -> None:
    report = merged.run().report
    assert all("merged" in entry for entry in report["prompts"])
    assert "answers" not in report["merge"]


def test_a_model_that_doesn_t_fit_into_memory_is_merged_but_not_asked(
    merged: Merged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "usable_memory", lambda: 1_000_000_000)
    report = merged.run().report
    assert not any("merged" in entry for entry in report["prompts"])
    assert report["merge"]["answers"] == "not asked: generating takes 1.6 GB of memory, and there are 1.0 GB"


def test_a_model_that_is_not_asked_takes_the_disk_of_one_file(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "usable_memory", lambda: 1_000_000_000)
    upload, on_disk = storage.LocalStorage.upload, []

    def watched(self: storage.LocalStorage, path: Path, *args: Any, **options: Any) -> str:
        on_disk.append(len(merged.scratch()))
        return upload(self, path, *args, **options)

    monkeypatch.setattr(storage.LocalStorage, "upload", watched)
    merged.run()
    assert max(on_disk) == 1
    assert not merged.scratch()


@pytest.mark.parametrize("uploads", [0, 1, 5])
def test_a_merge_that_dies_leaves_a_finished_run_and_can_be_done_again(
    merged: Merged, monkeypatch: pytest.MonkeyPatch, uploads: int
) -> None:
    merged.run()  # there are files of an earlier merge, which the next one replaces
    upload, left = storage.LocalStorage.upload, iter(range(uploads))

    def dying(self: storage.LocalStorage, path: Path, *args: Any, **options: Any) -> str:
        if next(left, None) is None:
            raise Stopped
        return upload(self, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage.LocalStorage, "upload", dying)
        with pytest.raises(Stopped):
            merged.run(dtype="float32")
    assert merged.job.train(merged.prepared).reason is Reason.ALREADY_TRAINED
    assert merged.run(dtype="float32").manifest.artifacts.merged is not None


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "3221225472\n"}, 3 << 30),
        ({"memory.max": "max\n"}, None),
        ({"memory/memory.limit_in_bytes": "1073741824\n"}, 1 << 30),
        ({}, None),
    ],
)
def test_usable_memory_is_what_the_cgroup_allows(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    machine = usable_memory(tmp_path / "none")
    assert usable_memory(tmp_path) == (machine if limit is None else min(limit, machine))
