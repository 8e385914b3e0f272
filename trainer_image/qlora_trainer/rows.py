"""Rows of one file, one at a time: JSON, JSON Lines, CSV or Parquet, compressed or not. A broken row is named by place.

Parquet and CSV count rows, JSON counts lines.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from qlora_trainer.json_stream import BrokenJsonError, JsonStream
from qlorajob.errors import Reason, StepError, first_line

PARQUET_BATCH = 1000
"""Rows that are decoded at once."""
PARQUET_BUFFER = 1 << 20
"""Bytes of a column that are read at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and the words for where it stands."""

    values: dict[str, Any]
    where: str


def is_data_file(name: str) -> bool:
    """Whether the name ends as a data file's does, perhaps with that of a compression behind it."""
    return _kind(name) in READERS


def read_file(path: Path, name: str) -> Iterator[Row]:
    """Rows of a file, which messages call `name`. Raises StepError at the first broken one."""
    reader = READERS.get(_kind(path.name)) or _sniff(path, name)
    try:
        yield from reader(path, name)
    except UnicodeDecodeError:
        raise _invalid(f"{name} line {_undecodable_line(path)} isn't UTF-8 text: save the file as UTF-8") from None
    except BrokenJsonError as error:
        raise _invalid(f"{name} line {error.line}: not valid JSON: {error}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if not _is_compressed(path):
            raise
        raise _invalid(f"{name} can't be unpacked: {str(error) or type(error).__name__}") from None


def _read_json_lines(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                where = f"{name} line {number}"
                yield Row(_record(_parse(text, where), where), where)


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """A list of objects, an object that holds one list (`{"data": [...]}`), or objects in a row: JSON Lines.

    An object alone that holds no list of objects is a row; so is a conversation.
    """
    with _open_text(path) as file:
        stream = JsonStream(file)
        if not stream.peek():
            return
        if stream.peek() == "[":
            for line, value in stream.items():
                yield Row(_record(value, f"{name} line {line}"), f"{name} line {line}")
            if stream.peek():
                raise _invalid(f"{name} line {stream.line}: something follows the list")
            return
        line, first = stream.value()
        if not stream.peek() and (key := _list_inside(first, name)):
            for number, record in enumerate(first[key], start=1):
                yield Row(_record(record, f"{name} record {number}"), f"{name} record {number}")
            return
        yield Row(_record(first, f"{name} line {line}"), f"{name} line {line}")
        while stream.peek():
            line, value = stream.value()
            yield Row(_record(value, f"{name} line {line}"), f"{name} line {line}")


def _list_inside(content: Any, name: str) -> str | None:
    """The key of the one list of rows in an object; None if the object is a row itself, such as a conversation."""
    if not isinstance(content, dict):
        return None
    lists: list[str] = [key for key, value in content.items() if isinstance(value, list)]
    rows = [key for key in lists if content[key] and all(isinstance(item, dict) for item in content[key])]
    if any(is_message(content[key][0]) for key in rows):
        return None
    if len(rows) == 1:
        return rows[0]
    if len(lists) == len(content) == 1:  # an empty list, or one with something else in it: its rows will tell
        return lists[0]
    if rows or (lists and len(lists) == len(content)):
        raise _invalid(f"{name} must hold a list of objects, alone or as the one list of an object")
    return None


def is_message(item: Mapping[str, Any]) -> bool:
    """Whether it is a turn of a conversation, and no row."""
    return {"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        try:
            _require_different(reader.fieldnames or (), name)
            for number, record in enumerate(reader, start=1):
                where = f"{name} row {number} (line {reader.line_num})"
                if None in record or None in record.values():
                    raise _invalid(f"{where}: not as many fields as the header has ({len(reader.fieldnames or ())})")
                yield Row(dict(record), where)
        except csv.Error as error:
            raise _invalid(f"{name} row {number + 1}: {error}") from None


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        # Else it reads a column's whole row group at once: pandas writes a million rows as one.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False)
        _require_different(file.schema_arrow.names, name)
        for batch in file.iter_batches(PARQUET_BATCH):
            for record in batch.to_pylist():
                number += 1
                yield Row(record, f"{name} row {number}")
    except pyarrow.ArrowException as error:
        if not number:
            raise _invalid(f"{name} isn't a Parquet file: {first_line(error)}") from None
        raise _invalid(_unreadable(name, number, error)) from None
    except (OverflowError, ValueError) as error:  # a date that Python doesn't have, bytes that aren't text
        raise _invalid(_unreadable(name, number, error)) from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not Arrow's
            raise
        raise _invalid(_unreadable(name, number, error)) from None


def _unreadable(name: str, read: int, error: Exception) -> str:
    """Arrow decodes many rows at once and doesn't say which it was."""
    return f"{name} can't be read after row {read}: {first_line(error)}; write the file anew"


def _require_different(columns: Sequence[str], name: str) -> None:
    """Of two columns with one name, only one would reach the row."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise _invalid(f"{name} has {count} columns called {column}: give each its own name")


Reader = Callable[[Path, str], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
DATA_FILES = f"{', '.join(sorted(READERS))} (the text ones also with {', '.join(sorted(OPENERS))} behind)"
"""For messages: what the name of a data file ends with."""


def _is_compressed(path: PurePath) -> bool:
    return path.suffix.lower() in OPENERS


def _kind(name: str) -> str:
    """The ending that says what a file holds: .jsonl of rows.jsonl.gz. Parquet is compressed inside, and only there."""
    path = PurePath(name)
    if not _is_compressed(path):
        return path.suffix.lower()
    inner = PurePath(path.stem).suffix.lower()
    return "" if inner == ".parquet" else inner


def _open(path: Path) -> IO[bytes]:
    opener = OPENERS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="")


def _sniff(path: Path, name: str) -> Reader:
    """A ConfigMap's key may have no ending; JSON tells itself apart."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start in (b"{", b"["):
        return _read_json
    raise _invalid(f"{name}: end the name with {DATA_FILES} to say what it holds")


def _undecodable_line(path: Path) -> int:
    """The first line that isn't UTF-8. No character holds a line break's byte, so that each line stands for itself."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise _invalid(f"{where} isn't UTF-8 text: save the file as UTF-8") from None
    except RecursionError:
        raise _invalid(f"{where}: lists and objects are nested too deeply") from None
    except ValueError as error:
        raise _invalid(f"{where}: not valid JSON: {error}") from None


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _invalid(f"{where}: a row must be a JSON object, not {type(value).__name__}")
    return value


def _invalid(message: str) -> StepError:
    return StepError(Reason.DATASET_INVALID, f"dataset: {message}", field="dataset.uri")
