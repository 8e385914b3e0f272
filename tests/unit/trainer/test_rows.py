"""Reading rows from files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_trainer.rows import is_data_file, read_file
from qlorajob.errors import Reason, StepError

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


def _zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_text_files_may_be_compressed(tmp_path: Path, suffix: str, packed: str) -> None:
    plain = _write(tmp_path / f"rows{suffix}")
    path = tmp_path / f"rows{suffix}{packed}"
    path.write_bytes(PACKERS[packed](plain.read_bytes()))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


@pytest.mark.parametrize("packed", PACKERS)
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"rows.jsonl{packed}"
    path.write_bytes(PACKERS[packed](_write(tmp_path / "rows.jsonl").read_bytes() * 1000)[:-9])
    with pytest.raises(StepError, match=rf"rows.jsonl{packed} can't be unpacked: ") as refused:
        list(read_file(path, path.name))
    assert refused.value.reason is Reason.DATASET_INVALID


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.CSV.gz", True),
        ("a.parquet", True),
        ("a.parquet.gz", False),
        ("a.gz", False),
        ("a", False),
    ],
)
def test_data_files_are_known_by_their_ending(name: str, expected: bool) -> None:
    assert is_data_file(name) is expected


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    """The first row comes although the second is broken."""
    for name in ("rows.jsonl", "rows.json"):
        path = tmp_path / name
        path.write_text('{"text": "x"}\n{"text": ')
        assert next(read_file(path, name)).values == {"text": "x"}


def test_rows_of_a_json_list_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(RECORDS, indent=2))
    assert [row.where for row in read_file(path, "rows.json")] == [f"rows.json line {n}" for n in (2, 5, 8)]


def test_rows_of_csv_and_parquet_are_named_by_number(tmp_path: Path) -> None:
    wheres = [[row.where for row in read_file(_write(tmp_path / name), name)] for name in ("r.csv", "r.parquet")]
    assert wheres == [
        ["r.csv row 1 (line 2)", "r.csv row 2 (line 4)", "r.csv row 3 (line 5)"],
        ["r.parquet row 1", "r.parquet row 2", "r.parquet row 3"],
    ]


def test_a_json_file_may_hold_the_list_in_an_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": "1.0", "data": RECORDS}))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("", [], id="an empty shard"),
        pytest.param('{"data": []}', [], id="an empty list"),
        pytest.param('{"text": "x"}', [{"text": "x"}], id="a line"),
        pytest.param('{"text": "x", "tags": []}', [{"text": "x", "tags": []}], id="a line with a list"),
        pytest.param('{"data": [{"from": "me"}]}', [{"from": "me"}], id="a list of one"),
        pytest.param(
            '{"messages": [{"role": "user", "content": "x"}]}',
            [{"messages": [{"role": "user", "content": "x"}]}],
            id="a conversation",
        ),
        pytest.param(
            '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
            [{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}],
            id="a conversation with tools",
        ),
        pytest.param(
            '{"prompt": [{"from": "human", "value": "x"}], "completion": [{"from": "gpt", "value": "y"}]}',
            [{"prompt": [{"from": "human", "value": "x"}], "completion": [{"from": "gpt", "value": "y"}]}],
            id="a conversation in two parts",
        ),
    ],
)
def test_a_json_file_may_hold_one_row_or_none(tmp_path: Path, content: str, expected: list[dict[str, Any]]) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert [row.values for row in read_file(tmp_path / "rows.json", "rows.json")] == expected


def test_a_parquet_file_that_is_damaged_inside_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [str(number) * 100 for number in range(4000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="snappy")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(StepError, match=r"a.parquet can't be read after row \d000: ") as refused:
        list(read_file(path, "a.parquet"))
    assert refused.value.reason is Reason.DATASET_INVALID


def test_a_date_that_python_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"at": pyarrow.array([2**30], pyarrow.date32())}), path)
    with pytest.raises(StepError, match=r"a.parquet can't be read after row 0: "):
        list(read_file(path, "a.parquet"))


def test_of_two_parquet_columns_with_one_name_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(StepError, match=r"a.parquet has 2 columns called text"):
        list(read_file(path, "a.parquet"))


def test_a_key_without_an_ending_is_recognised_as_json(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    assert [row.values for row in read_file(path, path.name)] == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl line 2: not valid JSON", id="broken line"),
        pytest.param("a.jsonl", b'["x"]\n', r"a.jsonl line 1: a row must be a JSON object, not list", id="list as row"),
        pytest.param(
            "a.json", b'[{"text": "x"}, 3]', r"a.json line 1: a row must be a JSON object, not int", id="number"
        ),
        pytest.param("a.json", b'[{"text": "x"]', r"a.json line 1: not valid JSON", id="broken list"),
        pytest.param("a.json", b'[{"text": "x"},\n{"text": x}]', r"a.json line 2: not valid JSON", id="broken item"),
        pytest.param("a.json", b'[{"text": "x"}]\n{}', r"a.json line 2: something follows the list", id="more"),
        pytest.param(
            "a.json", b'{"text": "x"}\n\n{"text"}', r"a.json line 3: not valid JSON", id="broken line of json"
        ),
        pytest.param("a.json", b'{"a": [], "b": []}', r"must hold a list of objects", id="two lists"),
        pytest.param("a.csv", b"a,b\n1,2\n3\n", r"a.csv row 2 \(line 3\): not as many fields as .* \(2\)", id="few"),
        pytest.param("a.csv", b"a,b\n1,2,3\n", r"a.csv row 1 \(line 2\): not as many fields", id="too many fields"),
        pytest.param("a.csv", b'a,b\n1,"2', r"a.csv row 1: unexpected end of data", id="open quote"),
        pytest.param("a.csv", b"a\nb\n\xff\xfe\n", r"a.csv line 3 isn't UTF-8 text", id="not UTF-8"),
        pytest.param("a.json", b'[{},\n{"a": "\xff"}]', r"a.json line 2 isn't UTF-8 text", id="JSON list not UTF-8"),
        pytest.param("a.csv", b"a,b,a\n1,2,3\n", r"a.csv has 2 columns called a: give each", id="a name twice"),
        pytest.param("a.jsonl", b"{}\n" + b"[" * 99999, r"a.jsonl line 2: .* nested too deeply", id="deep"),
        pytest.param("a.json", b"[{},\n" + b"[" * 99999, r"a.json line 2: .* nested too deeply", id="deep list"),
        pytest.param("a.json", b"[" + b"9" * 5000 + b"]", r"a.json line 1: .*Exceeds the limit", id="huge number"),
        pytest.param("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl line 2 isn't UTF-8 text", id="JSON not UTF-8"),
        pytest.param("a.parquet", b"PAR1nonsense", r"a.parquet isn't a Parquet file", id="not Parquet"),
        pytest.param("a.xls", b"\xd0\xcf", r"a.xls: end the name with", id="unknown ending"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StepError, match=words) as refused:
        list(read_file(tmp_path / name, name))
    assert refused.value.reason is Reason.DATASET_INVALID
