"""Checkpoints in storage. Each has a manifest of its own, written last; one without it, or not whole, doesn't count."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from qlora_trainer.artifacts import RunStore
from qlorajob.base import ContractModel
from qlorajob.errors import StepError
from qlorajob.manifest import CHECKPOINTS, MANIFEST, ManifestFile

logger = logging.getLogger(__name__)


class CheckpointManifest(ContractModel):
    """The content of checkpoints/step-N/manifest.json."""

    run_id: str
    step: Annotated[int, Field(ge=1)]
    files: tuple[ManifestFile, ...]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, store: RunStore, *, keep: int) -> None:
        self._store = store
        self._keep = keep

    def save(self, folder: Path, step: int) -> None:
        """Upload a checkpoint, then drop those beyond the newest `keep`."""
        prefix = _prefix(step)
        files = self._store.upload_tree(folder, prefix)
        manifest = CheckpointManifest(run_id=self._store.run_id, step=step, files=files)
        self._store.storage.write(f"{prefix}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        logger.info("checkpoint is in storage", extra={"checkpoint": step, "bytes": sum(file.bytes for file in files)})
        for old in self.steps()[self._keep :]:
            self._delete(old)

    def steps(self) -> list[int]:
        """Steps with a manifest, newest first."""
        found = []
        for item in self._store.storage.list(f"{CHECKPOINTS}/"):
            parts = item.key.split("/")
            number = parts[1].removeprefix("step-")
            if len(parts) == 3 and parts[2] == MANIFEST and number.isdigit():
                found.append(int(number))
        return sorted(found, reverse=True)

    def restore_newest(self, folder: Path) -> Path | None:
        """Download the newest checkpoint that is whole, under the name transformers gives it; None without one."""
        for step in self.steps():
            target = folder / f"checkpoint-{step}"
            shutil.rmtree(target, ignore_errors=True)
            manifest = self._manifest(step)
            if manifest is None:
                continue
            try:
                self._store.download_tree(manifest.files, _prefix(step), target)
            except (StepError, FileNotFoundError) as error:
                logger.warning("checkpoint %d isn't whole, an older one is tried: %s", step, error)
                shutil.rmtree(target, ignore_errors=True)
                continue
            return target
        return None

    def delete_all(self) -> None:
        """Drop every checkpoint: the finished adapter replaces them."""
        self._store.storage.delete([item.key for item in self._store.storage.list(f"{CHECKPOINTS}/")])

    def _manifest(self, step: int) -> CheckpointManifest | None:
        content = self._store.storage.read(f"{_prefix(step)}/{MANIFEST}")
        try:
            manifest = CheckpointManifest.model_validate_json(content or b"")
        except ValidationError:
            return None
        return manifest if manifest.run_id == self._store.run_id and manifest.step == step else None

    def _delete(self, step: int) -> None:
        """The manifest goes first, so that half a checkpoint never looks whole."""
        prefix = _prefix(step)
        self._store.storage.delete([f"{prefix}/{MANIFEST}"])
        self._store.storage.delete([item.key for item in self._store.storage.list(f"{prefix}/")])


def _prefix(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step}"
