"""manifest.json: what a run left in S3, file by file, and where it came from. Written last, so it means *done*."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AwareDatetime, Field

from qlorajob.base import ContractModel
from qlorajob.identity import digest
from qlorajob.status import Artifacts, MemoryStatus, Progress

MANIFEST = "manifest.json"
LATEST = "latest.json"
REPORT, REPORT_PAGE = "report.json", "report.html"
ADAPTER, CHECKPOINTS, MERGED, GGUF = "adapter", "checkpoints", "merged", "gguf"
EVENTS = "tensorboard/events.out.tfevents.qlora"
"""TensorBoard's file: it reads whatever has tfevents in its name."""


class ManifestFile(ContractModel):
    """One file below the run's prefix."""

    path: str
    """Relative to the run's prefix, such as adapter/adapter_model.safetensors."""
    bytes: Annotated[int, Field(ge=0)]
    """Size."""
    sha256: str
    """Hex digest of the content."""


def files_digest(files: Iterable[ManifestFile]) -> str:
    """Digest of an artifact: of its files' paths, sizes and digests, in order of path."""
    return "sha256:" + digest([file.to_wire() for file in sorted(files, key=lambda file: file.path)])


class Provenance(ContractModel):
    """Enough to make the run again."""

    model_uri: str
    model_revision: str
    dataset_uri: str
    dataset_digest: str
    image: str
    versions: dict[str, str]
    """Versions of Python and the libraries that shape the result."""
    seed: int
    spec: dict[str, Any]
    """The manifest's spec with defaults."""


class ArtifactManifest(ContractModel):
    """The content of <output.uri>/<run id>/manifest.json."""

    run_id: str
    created_at: AwareDatetime
    files: tuple[ManifestFile, ...]
    provenance: Provenance
    artifacts: Artifacts
    progress: Progress | None = None
    memory: MemoryStatus | None = None
    promoted: bool | None = None
    """Whether the adapter passed its gate; None without a gate."""


class Latest(ContractModel):
    """The content of <output.uri>/latest.json: the newest good run."""

    run_id: str
    uri: str
    """Prefix of the run."""
    created_at: AwareDatetime
