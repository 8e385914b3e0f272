"""Where rows come from: files, folders, splits, ConfigMaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.sources import choose_files, open_source
from qlorajob.errors import Reason, StepError
from tests.unit.trainer.jobs import Job


def _choose(root: Path, split: str) -> list[str]:
    files = choose_files(root, split, uri="file://x", field="dataset.uri", split_field="dataset.split")
    return [path.relative_to(root).as_posix() for path in files]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("train-00000.jsonl", "train-00001.jsonl", "validation.jsonl", "test/part.jsonl", "README.md"):
        path = tmp_path / "shards" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text('{"text": "x"}\n')
    return tmp_path / "shards"


def test_a_folder_gives_the_shards_of_the_split(shards: Path) -> None:
    assert _choose(shards, "train") == ["train-00000.jsonl", "train-00001.jsonl"]


def test_a_split_may_be_a_folder(shards: Path) -> None:
    assert _choose(shards, "test") == ["test/part.jsonl"]


def test_train_is_everything_when_no_file_names_a_split(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert _choose(tmp_path, "train") == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train_sft", ["data/train_sft-00000-of-00001.jsonl"]),
        ("part_1", ["part_1.jsonl"]),
        ("Test", ["data/Test.jsonl"]),
        ("2024", ["2024/rows.jsonl"]),
    ],
)
def test_a_split_may_be_called_as_its_owner_likes(tmp_path: Path, split: str, expected: list[str]) -> None:
    names = ("data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl", "data/Test.jsonl")
    for name in (*names, "part_1.jsonl", "part_10.jsonl", "2024/rows.jsonl", "20240/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    assert _choose(tmp_path, split) == expected


def test_files_about_a_dataset_are_no_rows(tmp_path: Path) -> None:
    for name in ("README.md", ".gitattributes", "dataset_infos.json", "dataset_dict.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert _choose(tmp_path, "train") == ["rows.jsonl"]


def test_a_split_that_is_not_there_is_named_with_what_is(shards: Path) -> None:
    with pytest.raises(
        StepError, match=r"dataset.split: no file .* belongs to the split dev; there are test/"
    ) as refused:
        _choose(shards, "dev")
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_NOT_FOUND, "dataset.split")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"there is no \.csv, .* file at"):
        _choose(tmp_path, "train")


def test_a_config_map_is_read_where_it_is_mounted(job: Job) -> None:
    mounted = job.folder / "mounts" / "configmap" / "codes" / "rows.jsonl"
    mounted.parent.mkdir(parents=True)
    mounted.write_text('{"text": "x"}\n')
    data = open_source(
        "configmap://codes/rows.jsonl", "train", job.settings(), field="dataset.uri", split_field="dataset.split"
    )
    assert [row.values for row in data] == [{"text": "x"}]


def test_the_digest_depends_on_the_content_alone(tmp_path: Path, job: Job) -> None:
    digests = []
    for name in ("one.jsonl", "two.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"text": "y"}\n' if name == "other.jsonl" else '{"text": "x"}\n')
        digests.append(
            open_source(f"file://{tmp_path / name}", "train", job.settings(), field="f", split_field="s").digest
        )
    assert digests[0] == digests[1] != digests[2]
