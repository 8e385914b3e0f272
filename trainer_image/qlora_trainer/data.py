"""The training data: read, filter, split, tokenise, pack. The same code in prepare and train, so their counts agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_trainer.formats import IGNORED, Columns, Encoder, Format
from qlora_trainer.packing import pack
from qlora_trainer.rows import RawData, Row, load_rows
from qlora_trainer.settings import Settings
from qlorajob import identity
from qlorajob.errors import Reason, StepError
from qlorajob.spec import QLoRAJobSpec

TOKENIZE_BATCH = 1000
TOKEN = np.int32


@dataclass(frozen=True, slots=True)
class Document:
    """One row as tokens. A label of -100 isn't learnt; the first never is, since nothing comes before it."""

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    labels: np.ndarray[Any, np.dtype[np.int32]]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and which of them share a sequence."""

    documents: Sequence[Document]
    sequences: Sequence[Sequence[int]]
    """Indices of the documents in each sequence. One each without packing."""

    @property
    def tokens(self) -> int:
        """Tokens of one pass, padding not counted."""
        return sum(len(document) for document in self.documents)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Everything that training needs of the data, and what the report says of it."""

    train: Corpus
    validation: Corpus | None
    encoder: Encoder
    digest: str
    dropped_rows: int
    truncated_rows: int

    @property
    def format(self) -> Format:
        """Format of the rows, found or given."""
        return self.encoder.columns.format

    def total_steps(self, spec: QLoRAJobSpec) -> int:
        """Optimizer steps of the whole run: transformers' count, which depends on the global batch alone."""
        if spec.training.max_steps is not None:
            return spec.training.max_steps
        epochs = spec.training.epochs if spec.training.epochs is not None else identity.DEFAULT_EPOCHS
        return math.ceil(epochs * math.ceil(len(self.train.sequences) / spec.training.global_batch_size))


def load_data(settings: Settings, tokenizer: Any) -> TrainingData:
    """Build the data of a run from its manifest. Raises StepError with the field that is to blame."""
    spec = settings.spec.dataset
    raw = load_rows(spec.uri, spec.split, settings, field="dataset.uri", split_field="dataset.split")
    if not raw.rows:
        raise StepError(Reason.DATASET_EMPTY, f"dataset.uri: {spec.uri} has no rows", field="dataset.uri")
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, raw))
    rows = _filtered(raw, spec.filter)
    digest = raw.digest
    held_out: Sequence[Row] = ()
    dropped = len(raw.rows) - len(rows)
    if spec.validation is not None and spec.validation.fraction is not None:
        rows, held_out = split_rows(rows, spec.validation.fraction, settings.spec.training.seed)
    elif spec.validation is not None:
        validation = _load_validation(settings)
        held_out = _filtered(validation, spec.filter)
        digest = identity.digest([raw.digest, validation.digest])
    train = _encode(rows, encoder, settings.spec)
    validation_corpus = _encode(held_out, encoder, settings.spec) if spec.validation is not None else None
    _require_rows(train, validation_corpus)
    return TrainingData(
        train=train.corpus,
        validation=validation_corpus.corpus if validation_corpus else None,
        encoder=encoder,
        digest=digest,
        dropped_rows=dropped + train.empty + (validation_corpus.empty if validation_corpus else 0),
        truncated_rows=train.truncated,
    )


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, chosen by the seed alone: at least one row on each side where there are two."""
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


@dataclass(frozen=True, slots=True)
class _Encoded:
    corpus: Corpus
    empty: int
    truncated: int


def _encode(rows: Sequence[Row], encoder: Encoder, spec: QLoRAJobSpec) -> _Encoded:
    """Tokenise and pack. Rows are cut at the end; those with nothing left to learn are dropped."""
    limit = spec.training.max_sequence_length
    documents: list[Document] = []
    empty = truncated = 0
    for encoded in _in_batches(rows, encoder):
        if encoded is None:
            empty += 1
            continue
        ids, labels = encoded
        truncated += len(ids) > limit
        labels = [IGNORED, *labels[1:limit]]
        if all(label == IGNORED for label in labels):
            empty += 1
            continue
        documents.append(Document(np.asarray(ids[:limit], TOKEN), np.asarray(labels, TOKEN)))
    lengths = [len(document) for document in documents]
    sequences = pack(lengths, limit) if spec.training.packing else [[number] for number in range(len(documents))]
    return _Encoded(Corpus(documents, sequences), empty, truncated)


def _in_batches(rows: Sequence[Row], encoder: Encoder) -> Iterable[tuple[list[int], list[int]] | None]:
    for start in range(0, len(rows), TOKENIZE_BATCH):
        yield from encoder.encode(rows[start : start + TOKENIZE_BATCH])


def _load_validation(settings: Settings) -> RawData:
    spec = settings.spec.dataset
    assert spec.validation is not None  # noqa: S101 - the caller's branch; tells mypy
    field = "dataset.validation.uri" if spec.validation.uri else "dataset.validation.split"
    return load_rows(
        spec.validation.uri or spec.uri,
        spec.validation.split or spec.split,
        settings,
        field=field,
        split_field="dataset.validation.split",
    )


def _filtered(data: RawData, wanted: Mapping[str, str]) -> Sequence[Row]:
    for column in wanted:
        if column not in data.columns:
            message = f"dataset.filter: there is no column {column}; the dataset has {', '.join(data.columns)}"
            raise StepError(Reason.COLUMN_MISSING, message, field="dataset.filter")
    if not wanted:
        return data.rows
    return [row for row in data.rows if all(_plain(row.values.get(key)) == value for key, value in wanted.items())]


def _plain(value: Any) -> str:
    """A value as the manifest's filter writes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_rows(train: _Encoded, validation: _Encoded | None) -> None:
    if not train.corpus.documents:
        message = "dataset: no row is left to train on; look at dataset.filter and at empty columns"
        raise StepError(Reason.DATASET_EMPTY, message, field="dataset.filter")
    if validation is not None and not validation.corpus.documents:
        message = "dataset.validation: no row is left to validate on; hold out more, or drop dataset.validation"
        raise StepError(Reason.DATASET_EMPTY, message, field="dataset.validation")
