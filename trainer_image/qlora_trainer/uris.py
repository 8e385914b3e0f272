"""URIs of models and datasets, as places this process can reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_trainer.settings import Settings
from qlorajob.errors import Reason, StepError


@dataclass(frozen=True, slots=True)
class HubRepo:
    """hf://organisation/name[@revision]."""

    repo: str
    revision: str | None


def is_hub(uri: str) -> bool:
    """Whether the URI names a repository on a Hugging Face hub."""
    return uri.startswith("hf://")


def is_s3(uri: str) -> bool:
    """Whether the URI names objects in S3."""
    return uri.startswith("s3://")


def hub_repo(uri: str) -> HubRepo:
    """The repository that an hf:// URI names."""
    repo, _, revision = uri.removeprefix("hf://").partition("@")
    return HubRepo(repo, revision or None)


def short_name(uri: str) -> str:
    """The end of a URI, without a revision: what people call the thing."""
    if is_hub(uri):
        return hub_repo(uri).repo.rpartition("/")[2]
    return unquote(uri.rstrip("/").rpartition("/")[2])


def local_path(uri: str, settings: Settings, *, missing: Reason, field: str) -> Path:
    """Where a pvc://, configmap:// or file:// URI is mounted. Raises StepError when there is nothing."""
    parts = urlsplit(uri)
    inside = unquote(parts.path) or "/"
    root = Path("/") if parts.scheme == "file" else settings.mount_root / parts.scheme / parts.netloc
    path = root / inside.lstrip("/")
    if ".." in path.parts or not path.exists():  # the manifest's own rule sees no dots that are written as %2e
        where = {"pvc": f"the claim {parts.netloc}", "configmap": f"the ConfigMap {parts.netloc}"}
        place = where.get(parts.scheme, "this machine")
        raise StepError(missing, f"{field}: {uri}: there is no {inside} in {place}", field=field)
    return path
