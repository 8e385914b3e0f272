"""Where the rows of a dataset are: files, folders of shards, ConfigMaps, S3, the hub. And a digest of what is there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote

from qlora_trainer import hub
from qlora_trainer.patience import open_input
from qlora_trainer.rows import DATA_FILES, Row, is_data_file, read_file
from qlora_trainer.settings import Settings
from qlora_trainer.uris import hub_repo, is_hub, is_s3, local_path
from qlorajob.errors import Reason, StepError
from qlorajob.identity import digest

ABOUT_DATA = frozenset({"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})
"""Files of a dataset's repository, or of `save_to_disk`, that say something about the rows and hold none."""
KNOWN_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one split, read anew at each iteration and never all in memory; and the digest of their source."""

    rows: Callable[[], Iterator[Row]]
    digest: str
    schema: Sequence[str] | None = None
    """Columns, where they are known without reading."""

    def __iter__(self) -> Iterator[Row]:
        return self.rows()

    def columns(self) -> list[str]:
        """Columns of any row, in order of appearance. Without a schema this reads every row."""
        if self.schema is not None:
            return list(self.schema) if next(iter(self), None) else []
        found: dict[str, None] = {}
        for row in self:
            found.update(dict.fromkeys(row.values))
        return list(found)


def open_source(uri: str, split: str, settings: Settings, *, field: str, split_field: str) -> Source:
    """One split of the dataset at a URI, on this machine. `field` and `split_field` are what messages name."""
    if is_hub(uri):
        return _open_hub(uri, hub.HubSplit(settings.spec.dataset.subset, split, field, split_field))
    if is_s3(uri):
        root = _fetch(uri, settings, field)
    else:
        root = local_path(uri, settings, missing=Reason.DATASET_NOT_FOUND, field=field)
    files = choose_files(root, split, uri=uri, field=field, split_field=split_field)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in files]

    def rows() -> Iterator[Row]:
        for path, name in zip(files, names, strict=True):
            yield from read_file(path, name)

    return Source(rows, digest([_sha256(path) for path in files]))


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
        and is_data_file(path.name)
        and path.name not in ABOUT_DATA
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        message = f"{field}: there is no {DATA_FILES} file at {uri}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=field)
    named = [path for path in files if _names(split, path.relative_to(root))]
    if not named and split == "train":
        named = [path for path in files if not _words(path.relative_to(root)) & set(KNOWN_SPLITS)]
    if not named:
        names = ", ".join(path.relative_to(root).as_posix() for path in files[:8])
        message = f"{split_field}: no file at {uri} belongs to the split {split}; there are {names}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=split_field)
    return named


def _names(split: str, path: PurePath) -> bool:
    """Whether the split's name stands in the path by itself: train in train-00000, not part_1 in part_10."""
    first, last = ("0-9" if split[end].isdigit() else "" for end in (0, -1))
    pattern = rf"(?<![a-z{first}]){re.escape(split.lower())}(?![a-z{last}])"
    return re.search(pattern, path.as_posix().lower()) is not None


def _words(path: PurePath) -> set[str]:
    return set(re.split(r"[^a-z]+", path.as_posix().lower()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(uri: str, settings: Settings, field: str) -> Path:
    """Copy a dataset in S3 to local disk: one object whose name ends as a data file's, else all below a prefix."""
    target = settings.folder("dataset") / hashlib.sha256(uri.encode()).hexdigest()[:16]
    parent, _, name = uri.rstrip("/").rpartition("/")
    name = unquote(name)
    single = is_data_file(name)
    storage = open_input(parent if single else uri, settings, field=field)
    keys = [item.key for item in storage.list(name if single else "")]
    chosen: Sequence[str] = [key for key in keys if (key == name if single else is_data_file(key))]
    if not chosen:
        message = f"{field}: there is no {'such object' if single else DATA_FILES + ' file'} at {uri}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=field)
    for key in chosen:
        storage.download(key, target / key)
    return target / name if single else target


def _open_hub(uri: str, part: hub.HubSplit) -> Source:
    repo = hub_repo(uri)
    commit = hub.resolve_dataset(repo, field=part.field)
    try:
        table = hub.load_dataset(repo.repo, commit, part)
    except StepError as error:
        if error.reason is Reason.DATASET_INVALID:  # `datasets` says neither the file nor the line
            for name, path in hub.dataset_files(repo.repo, commit, part):
                _require_readable(path, name)
        raise

    def rows() -> Iterator[Row]:
        for number, record in enumerate(table, start=1):
            yield Row(record, f"row {number}")

    return Source(rows, digest(["hub", commit, part.split]), schema=table.column_names)


def _require_readable(path: Path, name: str) -> None:
    """Read a file to its end. Raises StepError at the first broken row."""
    if is_data_file(name):
        for _ in read_file(path, name):
            pass
