"""A run's results into storage, once, although two processes may try: a pod that the cluster lost sight of may live on.

Each object is created on condition that there is none, or replaced on condition that it is the one that was looked at.
So nobody writes over results that a manifest already lists, and the manifest lists what is there. What a process that
died before its manifest left is replaced, after a while in which it may turn out to be alive.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_trainer.artifacts import RunStore, encode
from qlora_trainer.storage import ABSENT, Overtaken
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import MANIFEST, ArtifactManifest, ManifestFile

logger = logging.getLogger(__name__)

TRIES = 3
GRACE, LOOK = 60.0, 5.0
"""Seconds that another process gets from its results to its manifest, and between two looks for that."""


class PublishedElsewhere(Exception):  # noqa: N818 - it says what happened
    """Another process has published the run. Its results count."""

    def __init__(self, manifest: ArtifactManifest) -> None:
        super().__init__(f"another process has published run {manifest.run_id}")
        self.manifest = manifest


class Publication:
    """The results of this process on their way to storage. `scratch` has room for one of its files."""

    def __init__(self, store: RunStore, scratch: Path) -> None:
        self._store, self._storage = store, store.storage
        self._scratch = scratch
        self._tags: dict[str, str] = {}
        self._waited = False

    def tree(self, folder: Path, prefix: str) -> tuple[ManifestFile, ...]:
        """Put a folder's files below `prefix`, in place of what an earlier try left. Raises PublishedElsewhere."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = tuple(self._file(path, f"{prefix}/{path.relative_to(folder).as_posix()}") for path in paths)
        self._store.keep_only(files, prefix)
        return files

    def content(self, key: str, content: bytes) -> ManifestFile:
        """Put one object. Raises PublishedElsewhere."""
        sha256 = hashlib.sha256(content).hexdigest()
        self._put(key, sha256, lambda over: self._storage.write(key, content, over=over))
        return ManifestFile(path=key, bytes=len(content), sha256=sha256)

    def publish(self, manifest: ArtifactManifest) -> None:
        """Put the manifest, the last thing of a run. Raises PublishedElsewhere."""
        content = encode(manifest)
        over = ABSENT
        for _ in range(TRIES):
            self._require_untouched()
            try:
                self._storage.write(MANIFEST, content, over=over)
            except Overtaken:
                if self._storage.read(MANIFEST) == content:
                    return  # our own: its answer got lost and it was sent again
                theirs = self._store.manifest()
                if theirs and _digests(manifest) <= _digests(theirs):
                    raise PublishedElsewhere(theirs) from None
                over = self._tag(MANIFEST)  # it lists other files than there are: ours, which nobody touched
            else:
                return
        raise _contended()

    def _file(self, path: Path, key: str) -> ManifestFile:
        sha256 = _sha256(path)
        self._put(key, sha256, lambda over: self._storage.upload(path, key, over=over))
        return ManifestFile(path=key, bytes=path.stat().st_size, sha256=sha256)

    def _put(self, key: str, sha256: str, put: Callable[[str], str]) -> None:
        over = ABSENT
        for _ in range(TRIES):
            try:
                self._tags[key] = put(over)
            except Overtaken:
                self._refuse_if_published()
                if self._stored_sha256(key) == sha256:
                    self._tags[key] = self._tag(key)
                    return
                self._wait_for_their_manifest(key)
                over = self._tag(key)
            else:
                return
        raise _contended()

    def _wait_for_their_manifest(self, key: str) -> None:
        """Once: a process that lives needs no longer, however many files it left."""
        if self._waited:
            return
        logger.warning("%s is there already, but no manifest: waiting for the process that wrote it", key)
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            time.sleep(LOOK)
            self._refuse_if_published()
        self._waited = True

    def _refuse_if_published(self) -> None:
        if manifest := self._store.manifest():
            raise PublishedElsewhere(manifest)

    def _require_untouched(self) -> None:
        """What was put is still there. If not, another process took this one for dead, and goes on to its manifest."""
        tags = {item.key: item.tag for item in self._storage.list()}
        if any(tags.get(key) != tag for key, tag in self._tags.items()):
            raise _contended()

    def _tag(self, key: str) -> str:
        return next((item.tag for item in self._storage.list(key) if item.key == key), ABSENT)

    def _stored_sha256(self, key: str) -> str | None:
        with TemporaryDirectory(dir=self._scratch) as folder:
            path = Path(folder) / "stored"
            try:
                self._storage.download(key, path)
            except FileNotFoundError:
                return None
            return _sha256(path)


def _contended() -> StepError:
    message = "another process writes the results of the same run: looking again whether it is done"
    return StepError(Reason.STORAGE_UNAVAILABLE, message, code=ExitCode.TRANSIENT)


def _digests(manifest: ArtifactManifest) -> set[tuple[str, str]]:
    return {(file.path, file.sha256) for file in manifest.files}


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
