"""Checkpoints in storage. Each has a manifest of its own, written last; one without it, or not whole, doesn't count.

Every process writes below prefixes of its own, so that one that should be dead by now can't spoil what its successor
writes.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from qlora_trainer.artifacts import Damaged, RunStore
from qlora_trainer.publication import CLAIM, PublishedElsewhere
from qlorajob.base import ContractModel
from qlorajob.errors import StepError
from qlorajob.manifest import CHECKPOINTS, MANIFEST, ArtifactManifest, ManifestFile
from qlorajob.status import SavedCheckpoint

logger = logging.getLogger(__name__)

PREFIX = re.compile(rf"({CHECKPOINTS}/step-(\d+)\.[0-9a-f]+)/(.+)")


class CheckpointManifest(ContractModel):
    """The content of checkpoints/step-N.WRITER/manifest.json."""

    run_id: str
    step: Annotated[int, Field(ge=1)]
    files: tuple[ManifestFile, ...]


@dataclass(frozen=True, slots=True, order=True)
class StoredCheckpoint:
    """A checkpoint's place in storage."""

    step: int
    prefix: str


class CheckpointStore:
    """The checkpoints of one run. `warn` is told what a user should know of."""

    def __init__(self, store: RunStore, *, keep: int, warn: Callable[[str], None]) -> None:
        self._store, self._storage = store, store.storage
        self._keep = keep
        self._warn = warn
        self._writer = secrets.token_hex(4)
        self._broken: set[StoredCheckpoint] = set()

    def save(self, folder: Path, step: int) -> SavedCheckpoint:
        """Upload a checkpoint, then drop those beyond the newest `keep`.

        Raises PublishedElsewhere when the run is done already, by another process.
        """
        began = time.monotonic()
        if published := self._store.manifest():
            raise PublishedElsewhere(published)
        prefix = f"{CHECKPOINTS}/step-{step}.{self._writer}"
        files = self._store.upload_tree(folder, prefix)
        manifest = CheckpointManifest(run_id=self._store.run_id, step=step, files=files)
        self._storage.write(f"{prefix}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        size = sum(file.bytes for file in files)
        saved = SavedCheckpoint(step=step, bytes=size, seconds=round(time.monotonic() - began, 3))
        logger.info("checkpoint is in storage", extra={"checkpoint": step, "bytes": size, "seconds": saved.seconds})
        self._prune()
        return saved

    def whole(self) -> list[StoredCheckpoint]:
        """Checkpoints with a manifest, newest first."""
        return sorted((found for found, whole in self._found().items() if whole), reverse=True)

    def restore_newest(self, folder: Path) -> Path | None:
        """Download the newest checkpoint that is whole, under the name transformers gives it; None without one.

        The folder is emptied first: with `qlora run`, a process that was killed may have left something.
        """
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            newest = next((found for found in self.whole() if found not in self._broken), None)
            if newest is None:
                return None
            target = folder / f"checkpoint-{newest.step}"
            reason = self._download(newest, target)
            if reason is None:
                return target
            self._warn(f"checkpoint of step {newest.step} is skipped: {reason}")
            self._broken.add(newest)

    def sweep(self) -> None:
        """Drop what processes that were killed left half done."""
        uploads = self._storage.abort_uploads()
        torn = [found for found, whole in self._found().items() if not whole]
        for found in torn:
            self._delete(found)
        if uploads or torn:
            logger.warning(
                "dropped what a process that was killed left: %d uploads, %d checkpoints", uploads, len(torn)
            )

    def delete_all(self) -> None:
        """Drop every checkpoint: the finished adapter replaces them."""
        self._storage.delete([item.key for item in self._storage.list(f"{CHECKPOINTS}/")])
        self._storage.abort_uploads()

    def _found(self) -> dict[StoredCheckpoint, bool]:
        """Every checkpoint in storage, and whether it has its manifest."""
        found: dict[StoredCheckpoint, bool] = {}
        for item in self._storage.list(f"{CHECKPOINTS}/"):
            if match := PREFIX.fullmatch(item.key):
                place = StoredCheckpoint(int(match[2]), match[1])
                found[place] = found.get(place, False) or match[3] == MANIFEST
        return found

    def _download(self, checkpoint: StoredCheckpoint, target: Path) -> str | None:
        """Why the checkpoint isn't whole; None when it is."""
        content = self._storage.read(f"{checkpoint.prefix}/{MANIFEST}")
        try:
            manifest = CheckpointManifest.model_validate_json(content or b"")
        except ValidationError:
            return "its manifest can't be read"
        if (manifest.run_id, manifest.step) != (self._store.run_id, checkpoint.step):
            return f"it is of run {manifest.run_id}, step {manifest.step}"
        try:
            self._store.download_tree(manifest.files, checkpoint.prefix, target)
        except Damaged as error:
            return error.message
        except FileNotFoundError as error:
            return f"{error.filename or error} is missing"
        return None

    def _prune(self) -> None:
        """Drop what is older than the newest `keep`, and what couldn't be restored: it is no use, and would take the
        place of one that is. Checkpoints that stay too long do no harm."""
        try:
            whole = self.whole()
            usable = [found for found in whole if found not in self._broken]
            for found in (*usable[self._keep :], *self._broken.intersection(whole)):
                self._delete(found)
        except StepError as error:
            logger.warning("old checkpoints stay: %s", error.message, extra={"reason": error.reason})

    def _delete(self, checkpoint: StoredCheckpoint) -> None:
        """The manifest goes first, so that half a checkpoint never looks whole."""
        self._storage.delete([f"{checkpoint.prefix}/{MANIFEST}"])
        self._storage.delete([item.key for item in self._storage.list(f"{checkpoint.prefix}/")])


def conclude(store: RunStore, manifest: ArtifactManifest) -> None:
    """What follows a run's manifest: latest.json points to it, and its checkpoints go. The claim goes last."""
    store.point_latest(manifest)
    CheckpointStore(store, keep=0, warn=logger.warning).delete_all()
    store.storage.delete([CLAIM])


def is_concluded(store: RunStore) -> bool:
    """Whether nothing of that is left to do, for a run whose manifest is there."""
    return store.storage.read(CLAIM) is None
