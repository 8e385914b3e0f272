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
    place = hub_repo(uri).repo if is_hub(uri) else uri
    return place.rstrip("/").rpartition("/")[2]


def local_path(uri: str, settings: Settings, *, missing: Reason, field: str) -> Path:
    """Where a pvc://, configmap:// or file:// URI is mounted. Raises StepError when there is nothing."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
    else:
        path = settings.mount_root / parts.scheme / parts.netloc / unquote(parts.path).lstrip("/")
    if not path.exists():
        where = {"pvc": f"the claim {parts.netloc}", "configmap": f"the ConfigMap {parts.netloc}"}
        place = where.get(parts.scheme, "this machine")
        raise StepError(missing, f"{field}: {uri}: there is no {parts.path or '/'} in {place}", field=field)
    return path
