"""The Hugging Face hub: the only module that talks to it about models. Its errors leave as StepErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.uris import HubRepo
from qlorajob.errors import ExitCode, Reason, StepError


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model repository at one commit."""

    repo: str
    commit: str
    files: dict[str, int]
    """Size of each file."""


def resolve_model(repo: HubRepo) -> HubModel:
    """The commit that a revision means now, and its files."""
    from huggingface_hub import HfApi

    with _translated(repo, missing=Reason.MODEL_NOT_FOUND, field="model.uri"):
        info = HfApi().model_info(repo.repo, revision=repo.revision, files_metadata=True)
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    return HubModel(repo.repo, str(info.sha), files)


def download_model(repo: str, commit: str, files: list[str]) -> Path:
    """Folder with these files of the repository; what the cache has isn't fetched again."""
    from huggingface_hub import snapshot_download

    with _translated(HubRepo(repo, commit), missing=Reason.MODEL_NOT_FOUND, field="model.uri"):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=files))


def resolve_dataset(repo: HubRepo, *, field: str) -> str:
    """The commit that a revision of a dataset means now."""
    from huggingface_hub import HfApi

    with _translated(repo, missing=Reason.DATASET_NOT_FOUND, field=field):
        return str(HfApi().dataset_info(repo.repo, revision=repo.revision).sha)


@contextmanager
def _translated(repo: HubRepo, *, missing: Reason, field: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise StepError(Reason.ACCESS_DENIED, _gated(repo), field="model.tokenSecretRef") from None
    except errors.RepositoryNotFoundError:
        message = (
            f"{field}: there is no {repo.repo} on the hub, or it is private; "
            "correct the name, or give a token with access in model.tokenSecretRef"
        )
        raise StepError(missing, message, field=field) from None
    except (errors.RevisionNotFoundError, errors.HFValidationError):
        message = f"{field}: {repo.repo} has no revision {repo.revision or 'main'}"
        raise StepError(missing, message, field=field) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise StepError(Reason.ACCESS_DENIED, _gated(repo), field="model.tokenSecretRef") from None
        message = f"the hub answered {status} when asked for {repo.repo}; it is tried again"
        raise StepError(Reason.STORAGE_UNAVAILABLE, message, field=field, code=ExitCode.TRANSIENT) from None
    except (httpx.TransportError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        message = f"{field}: the hub can't be reached for {repo.repo} ({type(error).__name__}); check HF_ENDPOINT"
        raise StepError(Reason.ENDPOINT_UNREACHABLE, message, field=field, code=ExitCode.TRANSIENT) from None


def _gated(repo: HubRepo) -> str:
    return (
        f"model.tokenSecretRef: {repo.repo} needs an access token; accept its terms on the hub, put a token into a "
        "Secret and name it here"
    )
