"""From documents to batches: packed sequences whose documents don't see each other, or padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import pyarrow  # type: ignore[import-untyped]
import torch

from qlora_trainer.data import Corpus
from qlora_trainer.formats import IGNORED

TOKEN_COUNT = "num_tokens"  # noqa: S105 - tokens of text
"""Key of a batch that counts its tokens without padding: a number and no tensor, so that no GPU is asked for it."""
DOCUMENT_ENDS = "document_ends"
"""Key of a packed batch: where each document begins in the rows laid end to end, and their whole length; int32."""
LONGEST_DOCUMENT = "longest_document"
"""Key of a packed batch: tokens of its longest document."""

TOKENS = pyarrow.large_list(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {"input_ids": TOKENS, "labels": TOKENS, "seq_lengths": TOKENS, "length": pyarrow.int64()}  # SFTTrainer's names
)
TABLE_BATCH = 1000
"""Sequences that are in memory at once while the table is written."""


def model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a transformers model takes of a batch."""
    beside = {TOKEN_COUNT, DOCUMENT_ENDS, LONGEST_DOCUMENT}
    return {key: value for key, value in batch.items() if key not in beside}


def as_dataset(corpus: Corpus, folder: Path | None = None) -> Any:
    """The sequences as an Arrow table, which is what TRL's trainer takes. It is mapped from a file without a name."""
    with NamedTemporaryFile(dir=folder) as file:
        with pyarrow.OSFile(file.name, "wb") as sink, pyarrow.ipc.new_file(sink, SCHEMA) as writer:
            for start in range(0, len(corpus.sequences), TABLE_BATCH):
                writer.write_table(_table(corpus, corpus.sequences[start : start + TABLE_BATCH]))
        table = pyarrow.ipc.open_file(pyarrow.memory_map(file.name)).read_all()
    return datasets.Dataset(table, fingerprint=uuid4().hex)  # without one, it pickles every token to make one up


def _table(corpus: Corpus, sequences: Sequence[Sequence[int]]) -> Any:
    groups = [[corpus.documents[index] for index in sequence] for sequence in sequences]
    ordered = [document for group in groups for document in group]
    ends = np.cumsum([0, *(sum(len(document) for document in group) for group in groups)])
    documents = np.cumsum([0, *(len(group) for group in groups)])
    return pyarrow.table(
        [
            _lists(ends, np.concatenate([document.input_ids for document in ordered])),
            _lists(ends, np.concatenate([document.labels for document in ordered])),
            _lists(documents, np.asarray([len(document) for document in ordered], np.int32)),
            np.diff(ends),
        ],
        schema=SCHEMA,
    )


def _lists(offsets: Any, values: Any) -> Any:
    return pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), pyarrow.array(values))


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads sequences to the longest of the batch, or further: few different shapes are what GPUs like.

    Packed: position ids start again at each document and there is no attention mask, which is what makes transformers
    build a block-diagonal one. Padding gets position 0, so each padding token is a document of its own there. Where
    the documents' ends are used instead, the padding of a row is one document.
    Not packed: an attention mask, which every model understands.
    """

    pad_token_id: int
    packed: bool
    multiple: int = 1
    """Every length is a multiple of this."""
    end_to_end: bool = False
    """Packed sequences of a batch come as one: Unsloth's layers keep documents apart only then. A document's first
    token is never learnt, so that the loss is the same."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.multiple) * self.multiple
        batch: dict[str, Any] = {
            "input_ids": _padded([example["input_ids"] for example in examples], length, self.pad_token_id),
            "labels": _padded([example["labels"] for example in examples], length, IGNORED),
        }
        if self.packed:
            positions = [
                [position for size in example["seq_lengths"] for position in range(size)] for example in examples
            ]
            batch["position_ids"] = _padded(positions, length, 0)
            sizes = [
                size for example in examples for size in (*example["seq_lengths"], length - len(example["input_ids"]))
            ]
            batch[DOCUMENT_ENDS] = torch.tensor([0, *(size for size in sizes if size)]).cumsum(0, dtype=torch.int32)
            batch[LONGEST_DOCUMENT] = max(sizes)
        else:
            batch["attention_mask"] = _padded([[1] * len(example["input_ids"]) for example in examples], length, 0)
        if self.packed and self.end_to_end:
            batch |= {key: batch[key].view(1, -1) for key in ("input_ids", "labels", "position_ids")}
        batch[TOKEN_COUNT] = sum(len(example["input_ids"]) for example in examples)
        return batch


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)
