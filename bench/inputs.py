"""Random rows to train on, and a tokenizer that need not know their words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data import Corpus, Document, TrainingData
from qlora_trainer.packing import pack


def rows(lengths: Sequence[int], vocabulary: int) -> list[dict[str, Any]]:
    """Random token ids and labels. The first token isn't learnt: nothing comes before it."""
    draw = np.random.default_rng(1)
    made = []
    for length in lengths:
        ids = draw.integers(2, vocabulary, length, dtype=np.int32)
        made.append({"input_ids": ids, "labels": np.concatenate([[-100], ids[1:]]).astype(np.int32)})
    return made


def training_data(made: Sequence[dict[str, Any]], *, capacity: int | None = None) -> TrainingData:
    """The rows as prepared data; packed into sequences of `capacity` tokens, or one by one."""
    documents = [Document(**row) for row in made]
    if capacity is None:
        sequences = [[number] for number in range(len(documents))]
    else:
        sequences = pack([len(document) for document in documents], capacity)
    return TrainingData(Corpus(documents, sequences), None, encoder=None, digest="", summary=None)  # type: ignore[arg-type]


def tokenizer() -> Any:
    """Three words; padding is the end of the text."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
