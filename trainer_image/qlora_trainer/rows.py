"""Rows of a dataset, from files, folders of shards, ConfigMaps, S3 or the hub; and a digest of where they came from."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer import hub
from qlora_trainer.settings import Settings
from qlora_trainer.storage import open_storage
from qlora_trainer.uris import hub_repo, is_hub, is_s3, local_path
from qlorajob.errors import Reason, StepError
from qlorajob.identity import digest

KNOWN_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and the words for where it stands."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class RawData:
    """Every row of one split, and the digest of its source."""

    rows: Sequence[Row]
    digest: str

    @property
    def columns(self) -> list[str]:
        """Columns of any row, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))


def load_rows(uri: str, split: str, settings: Settings, *, field: str, split_field: str) -> RawData:
    """Read one split of the dataset at a URI. `field` and `split_field` are what messages name."""
    if is_hub(uri):
        return _load_hub(uri, split, field=field, split_field=split_field)
    if is_s3(uri):
        root = _fetch(uri, settings, field)
    else:
        root = local_path(uri, settings, missing=Reason.DATASET_NOT_FOUND, field=field)
    files = choose_files(root, split, uri=uri, field=field, split_field=split_field)
    rows: list[Row] = []
    digests = []
    for path in files:
        rows.extend(read_file(path, path.relative_to(root).as_posix() if path != root else path.name))
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return RawData(rows, digest(digests))


def choose_files(root: Path, split: str, *, uri: str, field: str, split_field: str) -> list[Path]:
    """The files of a split: the file itself, or those of a folder whose name says so.

    Without any file that names the split, `train` is everything that names no other split.
    """
    if root.is_file():
        return [root]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.suffix.lower() in READERS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        message = f"{field}: there is no {', '.join(sorted(READERS))} file at {uri}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=field)
    named = [path for path in files if split in _words(path, root)]
    if not named and split == "train":
        named = [path for path in files if not _words(path, root) & set(KNOWN_SPLITS)]
    if not named:
        names = ", ".join(path.relative_to(root).as_posix() for path in files[:8])
        message = f"{split_field}: no file at {uri} belongs to the split {split}; there are {names}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=split_field)
    return named


def read_file(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSON, JSON Lines, CSV or Parquet file. A broken one is named by file and line."""
    reader = READERS.get(path.suffix.lower()) or _sniff(path, name)
    try:
        yield from reader(path, name)
    except UnicodeDecodeError as error:
        raise _invalid(f"{name} isn't UTF-8 text (byte {error.start})") from None


def _words(path: Path, root: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.relative_to(root).with_suffix("").as_posix().lower()))


def _read_json_lines(path: Path, name: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{name} line {number}"
                yield Row(_record(_parse(line, where), where), where)


def _read_json(path: Path, name: str) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("{"):
        # {"data": [...]} is one object, and many files called .json really are JSON Lines
        try:
            content = json.loads(text)
        except ValueError:
            yield from _read_json_lines(path, name)
            return
    else:
        content = _parse(text, name)
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise _invalid(f"{name} must hold a list of objects, alone or as the one list of an object")
    for number, record in enumerate(lists[0], start=1):
        yield Row(_record(record, f"{name} record {number}"), f"{name} record {number}")


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                where = f"{name} line {reader.line_num}"
                if None in record or None in record.values():
                    raise _invalid(f"{where}: not as many fields as the header has ({len(reader.fieldnames or ())})")
                yield Row(dict(record), where)
        except csv.Error as error:
            raise _invalid(f"{name} line {reader.line_num}: {error}") from None


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield Row(record, f"{name} row {number}")
    except pyarrow.ArrowException as error:
        raise _invalid(f"{name} isn't a Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _sniff(path: Path, name: str) -> Callable[[Path, str], Iterator[Row]]:
    """A ConfigMap's key may have no ending; JSON tells itself apart."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start in (b"{", b"["):
        return _read_json
    raise _invalid(f"{name}: end the name with {', '.join(sorted(READERS))} to say what it holds")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _invalid(f"{where}: not valid JSON: {error}") from None


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _invalid(f"{where}: a row must be a JSON object, not {type(value).__name__}")
    return value


def _invalid(message: str) -> StepError:
    return StepError(Reason.DATASET_INVALID, f"dataset: {message}", field="dataset.uri")


def _fetch(uri: str, settings: Settings, field: str) -> Path:
    """Copy a dataset in S3 to local disk: one object whose name ends as a data file's, else all below a prefix."""
    target = settings.folder("dataset") / hashlib.sha256(uri.encode()).hexdigest()[:16]
    parent, _, name = uri.rstrip("/").rpartition("/")
    single = Path(name).suffix.lower() in READERS
    storage = open_storage(parent if single else uri, settings.spec.output, field=field)
    keys = [item.key for item in storage.list(name if single else "")]
    chosen = [key for key in keys if (key == name if single else Path(key).suffix.lower() in READERS)]
    if not chosen:
        message = f"{field}: there is no {'such object' if single else ', '.join(sorted(READERS)) + ' file'} at {uri}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=field)
    for key in chosen:
        storage.download(key, target / key)
    return target / name if single else target


def _load_hub(uri: str, split: str, *, field: str, split_field: str) -> RawData:
    repo = hub_repo(uri)
    commit = hub.resolve_dataset(repo, field=field)
    import datasets

    try:
        table = datasets.load_dataset(repo.repo, revision=commit, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise StepError(Reason.DATASET_NOT_FOUND, f"{field}: {str(error).splitlines()[0]}", field=field) from None
    except ValueError as error:
        if "split" in str(error):
            message = f"{split_field}: {repo.repo} has no split {split}: {str(error).splitlines()[0]}"
            raise StepError(Reason.DATASET_NOT_FOUND, message, field=split_field) from None
        message = f"{field}: {repo.repo} can't be loaded: {str(error).splitlines()[0]}"
        raise StepError(Reason.DATASET_INVALID, message, field=field) from None
    except RuntimeError as error:  # a loading script, which datasets no longer runs
        message = f"{field}: {repo.repo} can't be loaded: {str(error).splitlines()[0]}"
        raise StepError(Reason.DATASET_INVALID, message, field=field) from None
    rows = [Row(record, f"row {number}") for number, record in enumerate(table, start=1)]
    return RawData(rows, digest(["hub", commit, split]))
