"""The training data: read, filter, tokenise, split, pack. The same code in prepare and train, so their counts agree.

Rows are read one after the other and tokens go to disk: what stays in memory is some numbers a row.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from qlora_trainer.corpus import Corpus as Corpus
from qlora_trainer.corpus import Document as Document
from qlora_trainer.corpus import Documents, DocumentWriter, Numbers
from qlora_trainer.formats import IGNORED, Columns, Encoder, Format
from qlora_trainer.packing import pack
from qlora_trainer.rows import Row
from qlora_trainer.selection import Digests, Mask, held_out, repeated
from qlora_trainer.settings import Settings
from qlora_trainer.sources import Source, open_source
from qlora_trainer.statistics import histogram
from qlorajob import identity
from qlorajob.errors import Reason, StepError
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import DataSummary

TOKENIZE_BATCH = 128
DropReason = Literal["filter", "empty", "cut", "duplicate"]
"""dataset.filter, nothing to learn, nothing to learn before maxSequenceLength, dataset.deduplicate."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one source that became documents, and why the others didn't."""

    documents: Documents
    digests: Digests
    row_lengths: Numbers
    """Tokens of each row before it was cut."""
    learnt: Numbers
    """Tokens of each document that count in the loss."""
    rows: int
    """Rows that were read."""
    dropped: Counter[DropReason]

    def chosen(self, mask: Mask) -> Part:
        """Some of the documents."""
        return replace(
            self,
            documents=self.documents.chosen(mask),
            digests=self.digests[mask],
            row_lengths=self.row_lengths[mask],
            learnt=self.learnt[mask],
        )

    def without(self, mask: Mask, reason: DropReason) -> Part:
        """The documents but some, which are counted as dropped."""
        kept = self.chosen(~mask)
        return replace(kept, dropped=self.dropped + Counter({reason: int(mask.sum())}))


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Everything that training needs of the data, and what the report says of it."""

    train: Corpus
    validation: Corpus | None
    encoder: Encoder
    digest: str
    summary: DataSummary

    @property
    def format(self) -> Format:
        """Format of the rows, found or given."""
        return self.encoder.columns.format

    @property
    def dropped_rows(self) -> int:
        """Rows that are neither trained on nor held out."""
        return sum(self.summary.dropped.values())

    @property
    def truncated_rows(self) -> int:
        """Training rows that were cut."""
        return self.summary.truncated_rows

    def total_steps(self, spec: QLoRAJobSpec) -> int:
        """Optimizer steps of the whole run: transformers' count, which depends on the global batch alone."""
        if spec.training.max_steps is not None:
            return spec.training.max_steps
        epochs = spec.training.epochs if spec.training.epochs is not None else identity.DEFAULT_EPOCHS
        return math.ceil(epochs * math.ceil(len(self.train.sequences) / spec.training.global_batch_size))


def load_data(settings: Settings, tokenizer: Any) -> TrainingData:
    """Build the data of a run from its manifest. Raises StepError with the field that is to blame."""
    spec = settings.spec.dataset
    source = open_source(spec.uri, spec.split, settings, field="dataset.uri", split_field="dataset.split")
    columns = source.columns()
    if not columns:
        raise StepError(Reason.DATASET_EMPTY, f"dataset.uri: {spec.uri} has no rows", field="dataset.uri")
    chosen = (row for row in source if _passes(row, spec.filter))
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, columns, chosen))
    train = _encode(source, columns, encoder, settings)
    digest, validation = source.digest, None
    if spec.validation is not None and spec.validation.fraction is not None:
        mask = held_out(train.digests, spec.validation.fraction)
        train, validation = train.chosen(~mask), replace(train.chosen(mask), rows=0, dropped=Counter())
    elif spec.validation is not None:
        own = _open_validation(settings)
        if spec.validation.uri is None and own.digest == source.digest:
            raise _same_rows(settings)
        validation = _encode(own, _validation_columns(own, encoder, settings), encoder, settings)
        digest = identity.digest([source.digest, own.digest])
    return _training_data(train, validation, encoder, digest, settings.spec)


def _training_data(
    train: Part, validation: Part | None, encoder: Encoder, digest: str, spec: QLoRAJobSpec
) -> TrainingData:
    """Count, pack and refuse what is empty."""
    shared = np.isin(train.digests, validation.digests) if validation else np.zeros(len(train.digests), bool)
    if spec.dataset.deduplicate:
        train, shared = train.without(shared, "duplicate"), shared[:0]
    _require_documents(train, validation)
    dropped = train.dropped + (validation.dropped if validation else Counter())
    summary = DataSummary(
        read_rows=train.rows + (validation.rows if validation else 0),
        dropped={reason: dropped[reason] for reason in sorted(dropped)},
        truncated_rows=int((train.row_lengths > spec.training.max_sequence_length).sum()),
        shared_rows=int(shared.sum()),
        learnt_tokens=int(train.learnt.sum()),
        longest_row=int(train.row_lengths.max()),
        lengths=histogram(train.row_lengths),
    )
    return TrainingData(
        train=_corpus(train.documents, spec),
        validation=_corpus(validation.documents, spec) if validation else None,
        encoder=encoder,
        digest=digest,
        summary=summary,
    )


def _corpus(documents: Documents, spec: QLoRAJobSpec) -> Corpus:
    if spec.training.packing:
        return Corpus(documents, pack(documents.lengths.tolist(), spec.training.max_sequence_length))
    return Corpus(documents, [[number] for number in range(len(documents))])


def _encode(source: Source, columns: Sequence[str], encoder: Encoder, settings: Settings) -> Part:
    """Filter and tokenise. Rows are cut at the end; those with nothing to learn are dropped, and counted by reason."""
    spec = settings.spec
    _require_filter_columns(spec.dataset.filter, columns)
    limit = spec.training.max_sequence_length
    writer = DocumentWriter(settings.folder("tokens"), spec.training.seed)
    row_lengths, learnt, dropped, rows = array("q"), array("q"), Counter[DropReason](), 0
    for batch in _batches(source, TOKENIZE_BATCH):
        rows += len(batch)
        wanted = [row for row in batch if _passes(row, spec.dataset.filter)]
        dropped["filter"] += len(batch) - len(wanted)
        for encoded in encoder.encode(wanted):
            if encoded is None:
                dropped["empty"] += 1
                continue
            ids, labels = encoded
            labels = [IGNORED, *labels[1:limit]]
            count = len(labels) - labels.count(IGNORED)
            if not count:
                dropped["cut" if len(ids) > limit else "empty"] += 1
                continue
            writer.add(ids[:limit], labels)
            row_lengths.append(len(ids))
            learnt.append(count)
    documents, digests = writer.finish()
    part = Part(documents, digests, np.array(row_lengths), np.array(learnt), rows, +dropped)
    return part.without(repeated(digests), "duplicate") if spec.dataset.deduplicate else part


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _open_validation(settings: Settings) -> Source:
    spec = settings.spec.dataset
    assert spec.validation is not None  # noqa: S101 - the caller's branch; tells mypy
    return open_source(
        spec.validation.uri or spec.uri,
        spec.validation.split or spec.split,
        settings,
        field=_validation_field(settings),
        split_field="dataset.validation.split",
    )


def _same_rows(settings: Settings) -> StepError:
    spec = settings.spec.dataset
    message = (
        f"dataset.validation.split: the validation rows are the training rows themselves: {spec.uri} has no splits, or "
        "this is the one that is trained on; set dataset.validation.fraction, or dataset.validation.uri to other rows"
    )
    return StepError(Reason.DATASET_INVALID, message, field="dataset.validation.split")


def _validation_columns(source: Source, encoder: Encoder, settings: Settings) -> list[str]:
    """Columns of the validation data: those that the training data's format needs must be among them."""
    columns, field = source.columns(), _validation_field(settings)
    for name in encoder.columns.needed:
        if name not in columns:
            found = f"they have {', '.join(columns)}" if columns else "they have no rows"
            message = f"{field}: the validation data need a column {name}, as the training data; {found}"
            raise StepError(Reason.COLUMN_MISSING, message, field=field)
    return columns


def _validation_field(settings: Settings) -> str:
    validation = settings.spec.dataset.validation
    return "dataset.validation.uri" if validation and validation.uri else "dataset.validation.split"


def _require_filter_columns(wanted: Mapping[str, str], columns: Sequence[str]) -> None:
    for column in wanted:
        if column not in columns:
            message = f"dataset.filter: there is no column {column}; the dataset has {', '.join(columns)}"
            raise StepError(Reason.COLUMN_MISSING, message, field="dataset.filter")


def _passes(row: Row, wanted: Mapping[str, str]) -> bool:
    return all(value in _spellings(row.values.get(key)) for key, value in wanted.items())


def _spellings(value: Any) -> tuple[str, ...]:
    """How the manifest's filter may write a value."""
    if value is None or value != value:  # NaN is how pandas writes null
        return ("",)
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, float) and value.is_integer():  # one null makes a column of whole numbers one of floats
        return str(value), str(int(value))
    return (str(value),)


def _require_documents(train: Part, validation: Part | None) -> None:
    if not len(train.documents):
        message = f"dataset: no row is left to train on ({_dropped(train)})"
        raise _nothing_left(message, train, default="dataset.filter")
    if validation is not None and not len(validation.documents):
        if validation.rows:
            message = f"dataset.validation: no row is left to validate on ({_dropped(validation)})"
            raise _nothing_left(message, validation, default="dataset.validation")
        message = "dataset.validation: no row is left to validate on; hold out more, or drop dataset.validation"
        raise StepError(Reason.DATASET_EMPTY, message, field="dataset.validation")


ADVICE: Mapping[DropReason, tuple[str, str]] = {
    "filter": ("dataset.filter", "look at dataset.filter, whose values are compared as text"),
    "empty": ("dataset.columns", "look at dataset.columns: what is to be learnt is empty everywhere"),
    "cut": ("training.maxSequenceLength", "raise training.maxSequenceLength: what is to be learnt comes after it"),
    "duplicate": ("dataset.deduplicate", "look at dataset.validation: it holds the same rows"),
}
"""Field and words, by what dropped most rows."""


def _nothing_left(message: str, part: Part, *, default: str) -> StepError:
    worst = max(part.dropped, key=lambda reason: part.dropped[reason], default=None)
    field, advice = ADVICE[worst] if worst else (default, f"look at {default}")
    return StepError(Reason.DATASET_EMPTY, f"{message}; {advice}", field=field)


def _dropped(part: Part) -> str:
    return "dropped: " + ", ".join(f"{reason} {count}" for reason, count in sorted(part.dropped.items()))
