"""A run's results into storage, once, although two processes may try: a pod that the cluster lost sight of may live on.

S3 writes one object at a time, on condition of what was there. From that this makes one result:

1. A process claims the run. The claim of another is left alone for a while, then taken over: its process has died.
2. Who took over first spoils the manifest's key, so that the other, should it live, can't write its own any more.
3. Files replace what was looked at *before* the claim was seen to hold. So nobody replaces a later claimer's files.
4. The manifest replaces what step 2 left: nothing, in the ordinary case, or what was spoilt.

Whoever loses gives way. tests/unit/trainer/test_publication.py tries the orders in which all this can happen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from qlora_trainer.artifacts import RunStore, encode
from qlora_trainer.storage import ABSENT, Overtaken
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import MANIFEST, ArtifactManifest, ManifestFile

logger = logging.getLogger(__name__)

CLAIM = "publishing"
"""Key of the claim: who is about to publish the run. It goes when the run is done."""
TRIES = 5
GRACE, LOOK = 30.0, 3.0
"""Seconds that another process gets from its claim to its manifest, and between two looks for that."""


class PublishedElsewhere(Exception):  # noqa: N818 - it says what happened
    """Another process has published the run. Its results count."""

    def __init__(self, manifest: ArtifactManifest) -> None:
        super().__init__(f"another process has published run {manifest.run_id}")
        self.manifest = manifest


class Publication:
    """The results of this process on their way to storage. Each method may raise PublishedElsewhere."""

    def __init__(self, store: RunStore) -> None:
        """Claim the run."""
        self._store, self._storage = store, store.storage
        self._claim = json.dumps({"publishing": secrets.token_hex(8)}).encode()
        took_over = self._take_claim()
        self._manifest_tag = self._spoil_manifest(always=took_over)
        self._tags = self._look()

    def tree(self, folder: Path, prefix: str) -> tuple[ManifestFile, ...]:
        """Put a folder's files below `prefix`, in place of what an earlier try left."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = tuple(self._file(path, f"{prefix}/{path.relative_to(folder).as_posix()}") for path in paths)
        self._store.keep_only(files, prefix)
        return files

    def content(self, key: str, content: bytes) -> ManifestFile:
        """Put one object."""
        self._put(key, lambda over: self._storage.write(key, content, over=over))
        return ManifestFile(path=key, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def publish(self, manifest: ArtifactManifest) -> None:
        """Put the manifest, the last thing of a run."""
        content = encode(manifest)
        try:
            self._storage.write(MANIFEST, content, over=self._manifest_tag)
        except Overtaken:
            if self._storage.read(MANIFEST) != content:
                raise self._give_way() from None

    def _take_claim(self) -> bool:
        """Whether it was another's."""
        over = self._tag(CLAIM)
        if over != ABSENT:
            self._wait_for_their_manifest()
        try:
            self._storage.write(CLAIM, self._claim, over=over)
        except Overtaken:
            if not self._holds_claim():  # else the answer got lost, and it was sent again
                raise self._give_way() from None
        return over != ABSENT

    def _wait_for_their_manifest(self) -> None:
        logger.warning("another process has begun to publish this run: waiting whether it ends that")
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if manifest := self._store.manifest():
                raise PublishedElsewhere(manifest)
            time.sleep(LOOK)

    def _spoil_manifest(self, *, always: bool) -> str:
        """The tag that the manifest's key has from now on, until somebody publishes.

        A manifest whose files are gone is spoilt too: it would look whole again once others of their size are there.
        """
        tag = self._tag(MANIFEST)
        if manifest := self._store.manifest():
            raise PublishedElsewhere(manifest)
        if tag == ABSENT and not always:
            return ABSENT
        try:
            # The claim is no manifest, so the run counts as unfinished; and nobody else writes the same.
            return self._storage.write(MANIFEST, self._claim, over=tag)
        except Overtaken:
            if self._storage.read(MANIFEST) != self._claim:
                raise self._give_way() from None
            return self._tag(MANIFEST)

    def _look(self) -> dict[str, str]:
        """Every object's tag, at a time at which the claim held."""
        tags = {item.key: item.tag for item in self._storage.list()}
        if not self._holds_claim():
            raise self._give_way()
        return tags

    def _put(self, key: str, put: Callable[[str], str]) -> None:
        for _ in range(TRIES):
            try:
                put(self._tags.get(key, ABSENT))
            except Overtaken:
                self._tags = self._look()  # an earlier claimer was on its way, or an answer got lost
            else:
                return
        raise _contended()

    def _file(self, path: Path, key: str) -> ManifestFile:
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        self._put(key, lambda over: self._storage.upload(path, key, over=over))
        return ManifestFile(path=key, bytes=path.stat().st_size, sha256=sha256)

    def _holds_claim(self) -> bool:
        return self._storage.read(CLAIM) == self._claim

    def _give_way(self) -> Exception:
        manifest = self._store.manifest()
        return PublishedElsewhere(manifest) if manifest else _contended()

    def _tag(self, key: str) -> str:
        return next((item.tag for item in self._storage.list(key) if item.key == key), ABSENT)


def _contended() -> StepError:
    message = "another process publishes the same run: looking again whether it is done"
    return StepError(Reason.STORAGE_UNAVAILABLE, message, code=ExitCode.TRANSIENT)
