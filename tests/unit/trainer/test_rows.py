"""Reading rows from files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_trainer.rows import choose_files, load_rows, read_file
from qlorajob.errors import Reason, StepError
from tests.unit.trainer.jobs import Job

RECORDS = [{"text": "one"}, {"text": "zwei\n2"}, {"text": 'dr"ei, 三'}]


def _write(path: Path) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(RECORDS), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n", encoding="utf-8")
        case ".csv":
            path.write_text('text\none\n"zwei\n2"\n"dr""ei, 三"\n', encoding="utf-8")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"rows{suffix}")
    assert [row.values for row in read_file(path, path.name)] == RECORDS


def test_a_json_file_may_hold_the_list_in_an_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1.0", "data": RECORDS}))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


def test_a_key_without_an_ending_is_recognised_as_json(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl line 2: not valid JSON", id="broken line"),
        pytest.param("a.jsonl", b'["x"]\n', r"a.jsonl line 1: a row must be a JSON object, not list", id="list as row"),
        pytest.param("a.json", b'[{"text": "x"}, 3]', r"a.json record 2: a row must be a JSON object", id="number"),
        pytest.param("a.json", b'[{"text": "x"]', r"a.json: not valid JSON", id="broken file"),
        pytest.param("a.json", b'{"a": [], "b": []}', r"must hold a list of objects", id="two lists"),
        pytest.param("a.csv", b"a,b\n1,2\n3\n", r"a.csv line 3: not as many fields as the header has \(2\)", id="few"),
        pytest.param("a.csv", b"a,b\n1,2,3\n", r"a.csv line 2: not as many fields", id="too many fields"),
        pytest.param("a.csv", b'a,b\n1,"2', r"a.csv line 1: unexpected end of data", id="open quote"),
        pytest.param("a.csv", b"a\n\xff\xfe\n", r"a.csv isn't UTF-8 text", id="not UTF-8"),
        pytest.param("a.parquet", b"PAR1nonsense", r"a.parquet isn't a Parquet file", id="not Parquet"),
        pytest.param("a.xls", b"\xd0\xcf", r"a.xls: end the name with", id="unknown ending"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StepError, match=words) as refused:
        list(read_file(tmp_path / name, name))
    assert refused.value.reason is Reason.DATASET_INVALID


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
    data = load_rows(
        "configmap://codes/rows.jsonl", "train", job.settings(), field="dataset.uri", split_field="dataset.split"
    )
    assert [row.values for row in data.rows] == [{"text": "x"}]


def test_the_digest_depends_on_the_content_alone(tmp_path: Path, job: Job) -> None:
    digests = []
    for name in ("one.jsonl", "two.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"text": "y"}\n' if name == "other.jsonl" else '{"text": "x"}\n')
        digests.append(
            load_rows(f"file://{tmp_path / name}", "train", job.settings(), field="f", split_field="s").digest
        )
    assert digests[0] == digests[1] != digests[2]
