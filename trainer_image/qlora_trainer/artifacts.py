"""The run's prefix in storage: trees of files, and the manifest that is written last and so means *done*."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_trainer.patience import PatientStorage
from qlora_trainer.settings import Settings
from qlora_trainer.signals import StopSignal
from qlora_trainer.storage import ABSENT, Overtaken, Storage, open_storage
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.manifest import LATEST, MANIFEST, REPORT, ArtifactManifest, Latest, ManifestFile, files_digest
from qlorajob.status import Artifact

logger = logging.getLogger(__name__)

PROBE = ".qlora-write-test"


class Damaged(StepError):  # noqa: N818 - it says what happened
    """A stored file is there, but isn't the one that was uploaded."""

    def __init__(self, uri: str) -> None:
        message = f"{uri} isn't the file that was uploaded (its SHA-256 differs)"
        super().__init__(Reason.STORAGE_UNAVAILABLE, message, code=ExitCode.TRANSIENT)


class RunStore:
    """Everything below <output.uri>/<run id>, and latest.json beside it."""

    def __init__(self, output: Storage, run_id: str) -> None:
        self.run_id = run_id
        self.storage = output.within(run_id)
        self._output = output

    @classmethod
    def open(cls, settings: Settings, run_id: str, stop: StopSignal) -> RunStore:
        """The store of a run, which waits until storage works."""
        return cls(PatientStorage(open_output(settings), stop), run_id)

    def manifest(self) -> ArtifactManifest | None:
        """The manifest, if there is one and every file it lists is there in its size. Anything less isn't done."""
        content = self.storage.read(MANIFEST)
        if content is None:
            return None
        try:
            manifest = ArtifactManifest.model_validate_json(content)
        except ValidationError:
            logger.warning("%s/%s can't be read: the run counts as unfinished", self.storage.uri, MANIFEST)
            return None
        sizes = {item.key: item.bytes for item in self.storage.list()}
        broken = [file.path for file in manifest.files if sizes.get(file.path) != file.bytes]
        if broken or manifest.run_id != self.run_id:
            logger.warning("%s: %s is missing or cut: the run counts as unfinished", self.storage.uri, broken[:5])
            return None
        return manifest

    def report(self) -> dict[str, Any]:
        """The content of report.json; nothing where there is none."""
        return json.loads(self.storage.read(REPORT) or b"{}")  # type: ignore[no-any-return]

    def upload_tree(self, folder: Path, prefix: str) -> tuple[ManifestFile, ...]:
        """Copy a folder's files below `prefix`, and drop what an earlier try left there."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = tuple(self.upload_file(path, f"{prefix}/{path.relative_to(folder).as_posix()}") for path in paths)
        self.keep_only(files, prefix)
        return files

    def upload_file(self, path: Path, key: str) -> ManifestFile:
        """Copy one file."""
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        self.storage.upload(path, key)
        return ManifestFile(path=key, bytes=path.stat().st_size, sha256=sha256)

    def keep_only(self, files: Iterable[ManifestFile], prefix: str) -> None:
        """Delete everything else below `prefix`: what an earlier try left there."""
        wanted = {file.path for file in files}
        self.storage.delete([item.key for item in self.storage.list(f"{prefix}/") if item.key not in wanted])

    def write_file(self, key: str, content: bytes) -> ManifestFile:
        """Write one file."""
        self.storage.write(key, content)
        return ManifestFile(path=key, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def download_tree(self, files: Iterable[ManifestFile], prefix: str, folder: Path) -> None:
        """Copy the files below `prefix` to a folder. Raises Damaged when one isn't what the manifest says, and
        FileNotFoundError."""
        for file in files:
            if not file.path.startswith(f"{prefix}/"):
                continue
            path = folder / file.path.removeprefix(f"{prefix}/")
            self.storage.download(file.path, path)
            with path.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    raise Damaged(f"{self.storage.uri}/{file.path}")

    def artifact(self, files: Iterable[ManifestFile], path: str) -> Artifact:
        """The artifact at a path, for status and manifest."""
        files = [file for file in files if file.path == path or file.path.startswith(f"{path}/")]
        return Artifact(
            uri=f"{self.storage.uri}/{path}", digest=files_digest(files), bytes=sum(file.bytes for file in files)
        )

    def publish(self, manifest: ArtifactManifest) -> None:
        """Write the manifest, the last thing of a run."""
        self.storage.write(MANIFEST, encode(manifest))

    def point_latest(self, manifest: ArtifactManifest) -> None:
        """Let latest.json point at this run, unless it points at a newer one or this one isn't good enough."""
        if manifest.promoted is False:
            return
        while True:
            tag = next((item.tag for item in self._output.list(LATEST) if item.key == LATEST), ABSENT)
            content = self._output.read(LATEST)
            try:
                current = Latest.model_validate_json(content) if content else None
            except ValidationError:
                current = None
            if current is not None and current.created_at >= manifest.created_at:
                return
            latest = Latest(run_id=self.run_id, uri=self.storage.uri, created_at=manifest.created_at)
            try:
                self._output.write(LATEST, latest.model_dump_json(by_alias=True).encode(), over=tag)
            except Overtaken:
                continue  # by another run that ended just now, or by ourselves: its answer got lost
            return


def encode(manifest: ArtifactManifest) -> bytes:
    """The manifest as its file."""
    return manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()


def open_output(settings: Settings) -> Storage:
    """The storage of spec.output."""
    output = settings.spec.output
    return open_storage(output.uri, output, field="output.uri", accepted=settings.config.prepared is not None)


def check_output(output: Storage) -> None:
    """Prove that results can be written, before anything is computed: bucket, credentials, permissions, endpoint."""
    next(iter(output.list(PROBE)), None)
    output.write(PROBE, datetime.now(UTC).isoformat().encode())
    output.delete([PROBE])
