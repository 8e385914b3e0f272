"""Where the base model's files are, which revision that is, and how they get onto this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Protocol

from qlora_trainer import hub
from qlora_trainer.patience import open_input
from qlora_trainer.settings import Settings
from qlora_trainer.storage import StoredObject
from qlora_trainer.uris import HubRepo, hub_repo, is_hub, is_s3, local_path
from qlora_trainer.weight_names import BrokenFileError, absent_layers, names_in_file, names_in_index
from qlorajob.errors import Reason, StepError
from qlorajob.identity import digest

FIELD = "model.uri"
METADATA = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
"""Config, tokenizer, chat template, remote code: small, and all that prepare needs."""
SAFE_WEIGHTS, PICKLED_WEIGHTS = "*.safetensors", "*.bin"
WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NOT_THE_MODEL = ("training_args.bin", "optimizer.bin", "scheduler.bin", "adapter_model.*", "consolidated*.safetensors")

StartOf = Callable[[str, int], bytes]
"""ModelSource.start_of."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a model that count: top level only, safetensors rather than pickles."""

    metadata: dict[str, int]
    weights: dict[str, int]

    @classmethod
    def choose(cls, files: dict[str, int]) -> ModelFiles:
        """Pick from every file there is, given with its size."""
        top = {
            name: size
            for name, size in sorted(files.items())
            if "/" not in name and not name.startswith(".") and not _matches(name, NOT_THE_MODEL)
        }
        weights = {name: size for name, size in top.items() if fnmatch(name, SAFE_WEIGHTS)}
        weights = weights or {name: size for name, size in top.items() if fnmatch(name, PICKLED_WEIGHTS)}
        return cls({name: size for name, size in top.items() if _matches(name, METADATA)}, weights)

    def check(self, uri: str) -> None:
        """Refuse what is no model before anything is loaded."""
        if "config.json" not in self.metadata:
            raise StepError(Reason.MODEL_NOT_FOUND, f"{FIELD}: {uri} has no config.json: no model there", field=FIELD)
        if not self.weights:
            message = f"{FIELD}: {uri} has no weights (*.safetensors or *.bin)"
            raise StepError(Reason.MODEL_INVALID, message, field=FIELD)

    def tensor_names(self, uri: str, folder: Path, start_of: StartOf) -> Collection[str]:
        """The tensors that the weights hold, as far as an index or the heads of files say; empty where they don't.

        `folder` has the metadata. Refuses weights of which a part is missing, as after an upload that ended early.
        """
        try:
            for whole in WHOLE_WEIGHTS:
                if whole in self.weights:
                    return self._names_in([whole], start_of)
                if (index := f"{whole}.index.json") in self.metadata:
                    file_of = names_in_index(folder / index)
                    parts = set(file_of.values())
                    if missing := sorted(parts - self.weights.keys()):
                        raise _lacking(uri, f"{index} names {missing[0]}, which isn't there")
                    here = all((folder / part).exists() for part in parts)
                    return (self._names_in(parts, start_of) if here else None) or file_of.keys()
        except BrokenFileError as error:
            message = f"{FIELD}: the weights of {uri} can't be read: {error}"
            raise StepError(Reason.MODEL_INVALID, message, field=FIELD) from None
        message = f"{FIELD}: {uri} has neither {' nor '.join(WHOLE_WEIGHTS)}, nor an index of parts (….index.json)"
        raise StepError(Reason.MODEL_INVALID, message, field=FIELD)

    def _names_in(self, files: Collection[str], start_of: StartOf) -> set[str]:
        """The tensors of safetensors files; none of others."""
        if not all(fnmatch(file, SAFE_WEIGHTS) for file in files):
            return set()
        return set[str]().union(*(names_in_file(file, self.weights[file], partial(start_of, file)) for file in files))

    def check_layers(self, uri: str, folder: Path, layers: Iterable[str], start_of: StartOf) -> None:
        """Refuse weights that lack those of a linear layer. `layers` are module paths."""
        names = self.tensor_names(uri, folder, start_of)
        if absent := absent_layers(layers, names):
            more = f" and {len(absent) - 1} more that its config.json asks for" if len(absent) > 1 else ""
            raise _lacking(uri, f"there is no {absent[0]}{more}")

    @property
    def weight_bytes(self) -> int:
        """Size of the download."""
        return sum(self.weights.values())


def _lacking(uri: str, words: str) -> StepError:
    return StepError(Reason.MODEL_INVALID, f"{FIELD}: {uri} lacks weights: {words}", field=FIELD)


class ModelSource(Protocol):
    """A base model at one revision."""

    revision: str
    files: ModelFiles

    def metadata_folder(self) -> Path:
        """Folder with config and tokenizer."""

    def weights_folder(self) -> Path:
        """Folder with everything, the weights included."""

    def start_of(self, file: str, length: int) -> bytes:
        """The first bytes of a file, without bringing the rest of it here."""


def open_model(settings: Settings, revision: str | None = None) -> ModelSource:
    """The model of spec.model.uri: at the revision that prepare found, or (None) at what the URI means now."""
    uri = settings.spec.model.uri
    source: ModelSource
    if is_hub(uri):
        source = HubSource(uri, revision)
    elif is_s3(uri):
        source = S3Source(settings, revision)
    else:
        source = FolderSource(settings, revision)
    source.files.check(uri)
    return source


def weights_on_disk(settings: Settings) -> tuple[Path, ...]:
    """The weights that are on this machine already, as far as that can be told without asking anybody else."""
    uri, revision = settings.spec.model.uri, settings.prepared.model_revision
    try:
        if is_hub(uri):
            folder = hub.cached_model(hub_repo(uri).repo, revision)
        elif is_s3(uri):
            folder = _fetched_folder(settings, revision)
        else:
            folder = local_path(uri, settings, missing=Reason.MODEL_NOT_FOUND, field=FIELD)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()} if folder else {}
    except (StepError, OSError):
        return ()
    return tuple(folder / name for name in ModelFiles.choose(sizes).weights) if folder else ()


class HubSource:
    """A repository on a Hugging Face hub. The revision is its commit."""

    def __init__(self, uri: str, revision: str | None) -> None:
        repo = hub_repo(uri)
        model = hub.resolve_model(repo if revision is None else HubRepo(repo.repo, revision))
        self._repo = model.repo
        self.revision = model.commit
        self.files = ModelFiles.choose(model.files)

    def metadata_folder(self) -> Path:
        """See ModelSource."""
        return hub.download_model(self._repo, self.revision, list(self.files.metadata))

    def weights_folder(self) -> Path:
        """See ModelSource."""
        return hub.download_model(self._repo, self.revision, [*self.files.metadata, *self.files.weights])

    def start_of(self, file: str, length: int) -> bytes:
        """See ModelSource."""
        return hub.read_start(self._repo, self.revision, file, length)


class S3Source:
    """A folder in S3. The revision is a digest of names, sizes and ETags, so that no weights are read for it."""

    def __init__(self, settings: Settings, revision: str | None) -> None:
        uri = settings.spec.model.uri
        self._storage = open_input(uri, settings, field=FIELD)
        objects = {item.key: item for item in self._storage.list()}
        if not objects:
            raise StepError(Reason.MODEL_NOT_FOUND, f"{FIELD}: there is nothing at {uri}", field=FIELD)
        self.files = ModelFiles.choose({key: item.bytes for key, item in objects.items()})
        self.revision = self._digest(objects)
        _require_same(uri, self.revision, revision)
        self._folder = _fetched_folder(settings, self.revision)

    def _digest(self, objects: dict[str, StoredObject]) -> str:
        chosen = sorted({**self.files.metadata, **self.files.weights})
        return digest([[key, objects[key].bytes, objects[key].tag] for key in chosen])

    def metadata_folder(self) -> Path:
        """See ModelSource."""
        return self._fetch(self.files.metadata)

    def weights_folder(self) -> Path:
        """See ModelSource."""
        return self._fetch({**self.files.metadata, **self.files.weights})

    def start_of(self, file: str, length: int) -> bytes:
        """See ModelSource."""
        return self._storage.read_start(file, length)

    def _fetch(self, files: dict[str, int]) -> Path:
        for name, size in files.items():
            path = self._folder / name
            if not path.exists() or path.stat().st_size != size:
                self._storage.download(name, path)
        return self._folder


class FolderSource:
    """A mounted volume, or a folder of this machine. The revision is a digest of the files' content."""

    def __init__(self, settings: Settings, revision: str | None) -> None:
        uri = settings.spec.model.uri
        self._folder = local_path(uri, settings, missing=Reason.MODEL_NOT_FOUND, field=FIELD)
        if not self._folder.is_dir():
            raise StepError(Reason.MODEL_NOT_FOUND, f"{FIELD}: {uri} is a file, not a folder", field=FIELD)
        self.files = ModelFiles.choose({path.name: path.stat().st_size for path in self._folder.iterdir()})
        # Reading every weight takes a minute for 14 GB: prepare does it, the GPU doesn't wait for it a second time.
        self.revision = revision or _content_digest(self._folder, {**self.files.metadata, **self.files.weights})

    def metadata_folder(self) -> Path:
        """See ModelSource."""
        return self._folder

    def weights_folder(self) -> Path:
        """See ModelSource."""
        return self._folder

    def start_of(self, file: str, length: int) -> bytes:
        """See ModelSource."""
        with (self._folder / file).open("rb") as opened:
            return opened.read(length)


def _fetched_folder(settings: Settings, revision: str) -> Path:
    """Where the model of an S3Source is put."""
    return (settings.cache_dir or settings.work_dir) / "models" / revision


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _content_digest(folder: Path, names: Iterable[str]) -> str:
    contents = []
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            contents.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(contents)


def _require_same(uri: str, found: str, expected: str | None) -> None:
    """A model that changed between prepare and train would be recorded under the wrong revision."""
    if expected is not None and found != expected:
        message = f"{FIELD}: {uri} has changed since it was prepared; apply the job again to use the new one"
        raise StepError(Reason.MODEL_INVALID, message, field=FIELD)
