"""The Hugging Face hub: the only module that talks to it. Its errors leave as StepErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from qlora_trainer.uris import HubRepo
from qlorajob.errors import ExitCode, Reason, StepError, first_line


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model repository at one commit."""

    repo: str
    commit: str
    files: dict[str, int]
    """Size of each file; 0 where the hub doesn't tell it."""


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


def read_start(repo: str, commit: str, file: str, length: int) -> bytes:
    """The first bytes of a model's file. Of a hub that knows no ranges, no more is read either."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

    url = hf_hub_url(repo, file, revision=commit)
    headers = build_hf_headers() | {"Range": f"bytes=0-{length - 1}", "Accept-Encoding": "identity"}
    read = bytearray()
    with (
        _translated(HubRepo(repo, commit), missing=Reason.MODEL_NOT_FOUND, field="model.uri"),
        get_session().stream("GET", url, headers=headers) as response,
    ):
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return b""  # an empty file has no such range
        if response.is_error:
            response.read()  # what it says
        hf_raise_for_status(response)
        for part in response.iter_bytes():
            read += part
            if len(read) >= length:
                break
    return bytes(read[:length])


def cached_model(repo: str, commit: str) -> Path | None:
    """Folder with what the cache has of the repository; None if that is nothing. Asks no hub."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=commit)
    return Path(config).parent if isinstance(config, str) else None


def resolve_dataset(repo: HubRepo, *, field: str) -> str:
    """The commit that a revision of a dataset means now."""
    from huggingface_hub import HfApi

    with _translated(repo, missing=Reason.DATASET_NOT_FOUND, field=field):
        return str(HfApi().dataset_info(repo.repo, revision=repo.revision).sha)


@dataclass(frozen=True, slots=True)
class HubSplit:
    """Which part of a dataset repository, and the fields of the manifest that say so."""

    subset: str | None
    split: str
    field: str
    split_field: str


def load_dataset(repo: str, commit: str, part: HubSplit) -> Any:
    """One split of a dataset at a commit, as `datasets` keeps it: in Arrow files on disk, mapped into memory."""
    from datasets import exceptions, load_dataset
    from datasets.data_files import EmptyDatasetError

    try:
        with _translated(HubRepo(repo, commit), missing=Reason.DATASET_NOT_FOUND, field=part.field):
            return load_dataset(repo, part.subset, revision=commit, split=part.split)
    except (exceptions.DatasetNotFoundError, exceptions.DataFilesNotFoundError, EmptyDatasetError) as error:
        message = f"{part.field}: {first_line(error)}"
        raise StepError(Reason.DATASET_NOT_FOUND, message, field=part.field) from None
    except FileNotFoundError as error:  # it was there just before, when it was asked for its commit
        raise _unreachable(repo, part.field, error) from None
    except (ValueError, RuntimeError, exceptions.DatasetsError) as error:
        raise _unusable(repo, part, error) from None


def dataset_files(repo: str, commit: str, part: HubSplit) -> Iterator[tuple[str, Path]]:
    """The files that a dataset is made of: their names in the repository, and where they are on this machine."""
    from datasets import load_dataset_builder
    from huggingface_hub import hf_hub_download

    with _translated(HubRepo(repo, commit), missing=Reason.DATASET_NOT_FOUND, field=part.field):
        files = load_dataset_builder(repo, part.subset, revision=commit).config.data_files or {}
        for url in dict.fromkeys(url for urls in files.values() for url in urls):
            if name := url.partition(f"@{commit}/")[2]:  # else the file lies elsewhere, as a dataset's card may say
                yield name, Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))


def _unusable(repo: str, part: HubSplit, error: Exception) -> StepError:
    """What `datasets` found wrong: it says which by its words alone."""
    said = " ".join(str(error).split())
    if said.startswith(("Config name is missing", "BuilderConfig")):
        subsets = said.partition("[")[2].partition("]")[0]
        message = f"dataset.subset: {repo} comes in subsets, set this to one of {subsets}"
        return StepError(Reason.DATASET_NOT_FOUND, message, field="dataset.subset")
    if isinstance(error, ValueError) and "split" in said:
        message = f"{part.split_field}: {repo} has no split {part.split}: {first_line(error)}"
        return StepError(Reason.DATASET_NOT_FOUND, message, field=part.split_field)
    why = " ".join(str(error.__cause__ or error).split())[:300]
    message = f"{part.field}: {repo} can't be loaded: {why}"
    return StepError(Reason.DATASET_INVALID, message, field=part.field)


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
        raise _unreachable(repo.repo, field, error) from None


def _unreachable(repo: str, field: str, error: Exception) -> StepError:
    message = f"{field}: the hub can't be reached for {repo} ({type(error).__name__}); check HF_ENDPOINT"
    return StepError(Reason.ENDPOINT_UNREACHABLE, message, field=field, code=ExitCode.TRANSIENT)


def _gated(repo: HubRepo) -> str:
    return (
        f"model.tokenSecretRef: {repo.repo} needs an access token; accept its terms on the hub, put a token into a "
        "Secret and name it here"
    )
