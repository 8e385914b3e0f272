"""Object storage as the commands see it: a prefix in an S3 bucket (package `s3`), or a local folder for `qlora run`.

S3's errors are StepErrors that name the field to look at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from qlorajob.spec import OutputSpec

ABSENT = ""
"""As `over`: there must be no object yet."""
UNFINISHED = ".partial"
"""Ending of local files that aren't whole yet."""


class Overtaken(Exception):  # noqa: N818 - it says what happened
    """The object isn't in the version that was to be written over: another process was faster."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object below a storage's prefix."""

    key: str
    bytes: int
    tag: str
    """Changes with the content: S3's ETag, or size and time of a local file."""


class Storage(Protocol):
    """A prefix in a bucket, or a folder. Keys are relative to it, with slashes."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in order of key."""

    def read(self, key: str) -> bytes | None:
        """Content of a small object; None when there is none."""

    def read_start(self, key: str, length: int) -> bytes:
        """The first bytes of an object, as many as there are. Raises FileNotFoundError."""

    def write(self, key: str, content: bytes, *, over: str | None = None) -> str:
        """Create or replace an object, atomically; its new tag.

        With `over`, only if the object has that tag, or is ABSENT. Raises Overtaken if not.
        """

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which appears when it is whole. Raises FileNotFoundError."""

    def upload(self, path: Path, key: str, *, over: str | None = None) -> str:
        """Copy a local file to an object, which appears when it is whole; its new tag. `over` as in `write`."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that aren't there are none of our business."""

    def abort_uploads(self) -> int:
        """Drop what uploads that never ended left; how many there were. Those of live processes fail."""

    def within(self, prefix: str) -> Storage:
        """The storage below a prefix of this one."""


def open_storage(uri: str, output: OutputSpec, *, field: str, accepted: bool = False) -> Storage:
    """The storage at an s3:// or file:// URI. Endpoint, region and credentials are those of spec.output.

    `field` is the one that named the URI, for messages. `accepted` says that an earlier step could use the credentials:
    if they don't do any more, they ran out or are being rotated, which passes.
    """
    uri = uri.rstrip("/")
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.scheme == "file":
        return LocalStorage(Path(path), uri)
    from qlora_trainer.s3.client import open_client  # boto3 takes a second to import
    from qlora_trainer.s3.errors import Blame
    from qlora_trainer.s3.storage import S3Storage

    return S3Storage(open_client(output), parts.netloc, path.strip("/"), Blame(field, output, accepted))


class LocalStorage:
    """A folder on this machine."""

    def __init__(self, root: Path, uri: str) -> None:
        self.uri = uri
        self._root = root

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Storage."""
        for path in sorted(self._root.rglob("*")):
            key = path.relative_to(self._root).as_posix()
            if key.startswith(prefix) and path.is_file() and not path.name.endswith(UNFINISHED):
                yield StoredObject(key, path.stat().st_size, _tag(path))

    def read(self, key: str) -> bytes | None:
        """See Storage."""
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_start(self, key: str, length: int) -> bytes:
        """See Storage."""
        with (self._root / key).open("rb") as file:
            return file.read(length)

    def write(self, key: str, content: bytes, *, over: str | None = None) -> str:
        """See Storage."""
        with appearing(self._root / key, over=over) as unfinished:
            unfinished.write_bytes(content)
        return _tag(self._root / key)

    def download(self, key: str, path: Path) -> None:
        """See Storage."""
        with appearing(path) as unfinished:
            shutil.copyfile(self._root / key, unfinished)

    def upload(self, path: Path, key: str, *, over: str | None = None) -> str:
        """See Storage."""
        with appearing(self._root / key, over=over) as unfinished:
            shutil.copyfile(path, unfinished)
        return _tag(self._root / key)

    def delete(self, keys: Iterable[str]) -> None:
        """See Storage. Folders that become empty go too, as they would in S3."""
        for key in keys:
            self._remove(self._root / key)

    def abort_uploads(self) -> int:
        """See Storage."""
        found = list(self._root.rglob(f"*{UNFINISHED}"))
        for path in found:
            self._remove(path)
        return len(found)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        folder = path.parent
        while folder != self._root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def within(self, prefix: str) -> LocalStorage:
        """See Storage."""
        return LocalStorage(self._root / prefix, f"{self.uri}/{prefix}")


@contextmanager
def appearing(path: Path, *, over: str | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well. `over` as in Storage.write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        if over == ABSENT:
            _link(unfinished, path)
        elif over is not None and (not path.exists() or _tag(path) != over):
            raise Overtaken(str(path))
        else:
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _link(unfinished: Path, path: Path) -> None:
    """Give the file its name unless that is taken, in one step; in two where there are no hard links."""
    try:
        path.hardlink_to(unfinished)
    except FileExistsError:
        raise Overtaken(str(path)) from None
    except OSError:
        if path.exists():
            raise Overtaken(str(path)) from None
        unfinished.replace(path)


def _tag(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"
