"""Batches: padding, packing, and documents that don't see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_trainer.batches import DOCUMENT_ENDS, LONGEST_DOCUMENT, TOKEN_COUNT, Collator, as_dataset, model_inputs
from qlora_trainer.data import Corpus, Document
from qlora_trainer.formats import IGNORED

PAD = 9


def _document(*ids: int) -> Document:
    return Document(np.asarray(ids, np.int32), np.asarray([IGNORED, *ids[1:]], np.int32))


CORPUS = Corpus([_document(1, 2, 3), _document(4, 5), _document(6, 7, 8, 9)], [[2], [0, 1]])


def test_the_table_holds_the_sequences_in_their_order() -> None:
    assert as_dataset(CORPUS)[:] == {
        "input_ids": [[6, 7, 8, 9], [1, 2, 3, 4, 5]],
        "labels": [[IGNORED, 7, 8, 9], [IGNORED, 2, 3, IGNORED, 5]],
        "seq_lengths": [[4], [3, 2]],
        "length": [4, 5],
    }


def _batch(*, packed: bool) -> dict[str, list[Any]]:
    table = as_dataset(CORPUS)
    batch = Collator(PAD, packed)([table[0], table[1]])
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def test_padding_is_on_the_right() -> None:
    assert _batch(packed=False)["input_ids"] == [[6, 7, 8, 9, PAD], [1, 2, 3, 4, 5]]


def test_padding_is_masked_by_position_and_a_real_pad_token_is_learnt() -> None:
    assert _batch(packed=False)["labels"][0] == [IGNORED, 7, 8, PAD, IGNORED]


def test_without_packing_there_is_an_attention_mask() -> None:
    assert _batch(packed=False)["attention_mask"] == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_packed_positions_start_again_at_each_document() -> None:
    assert _batch(packed=True)["position_ids"] == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]


def test_packed_rows_laid_end_to_end_are_one_row_of_the_same_documents() -> None:
    table = as_dataset(CORPUS)
    batch = Collator(PAD, packed=True, end_to_end=True)([table[0], table[1]])
    rows = _batch(packed=True)
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].tolist() == [rows[key][0] + rows[key][1]]
    assert batch[TOKEN_COUNT] == rows[TOKEN_COUNT]


def test_packed_batches_have_no_attention_mask() -> None:
    assert "attention_mask" not in _batch(packed=True)


def test_tokens_are_counted_without_padding() -> None:
    assert _batch(packed=True)[TOKEN_COUNT] == 9


def test_documents_end_where_the_next_begins_and_padding_is_one_of_its_own() -> None:
    batch = _batch(packed=True)
    assert batch[DOCUMENT_ENDS] == [0, 4, 5, 8, 10]
    assert batch[LONGEST_DOCUMENT] == 4


@pytest.mark.parametrize("packed", [True, False])
def test_the_model_gets_tensors_that_transformers_knows(packed: bool) -> None:
    names = {"input_ids", "labels", "position_ids" if packed else "attention_mask"}
    assert model_inputs(_batch(packed=packed)).keys() == names


def test_a_length_is_filled_up_to_a_multiple() -> None:
    table = as_dataset(CORPUS)
    batch = Collator(PAD, packed=True, multiple=8)([table[0], table[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch[DOCUMENT_ENDS].tolist() == [0, 4, 8, 11, 13, 16]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def _logits(model: Any, corpus: Corpus) -> torch.Tensor:
    """Logits of every sequence of a corpus in one packed batch."""
    table = as_dataset(corpus)
    batch = Collator(PAD, packed=True)([table[number] for number in range(len(table))])
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return output.logits  # type: ignore[no-any-return]


def test_changing_a_document_leaves_its_neighbours_logits_equal_to_the_bit(model: Any) -> None:
    neighbour = _document(50, 51, 52, 53)
    one = _logits(model, Corpus([_document(1, 2, 3), neighbour], [[0, 1]]))
    other = _logits(model, Corpus([_document(7, 8, 9), neighbour], [[0, 1]]))
    assert not torch.equal(one[0, :3], other[0, :3])
    assert torch.equal(one[0, 3:], other[0, 3:])


def test_a_packed_document_gets_the_logits_it_gets_alone(model: Any) -> None:
    document = _document(50, 51, 52, 53)
    packed = _logits(model, Corpus([_document(1, 2, 3), document], [[0, 1]]))
    alone = _logits(model, Corpus([document], [[0]]))
    torch.testing.assert_close(packed[0, 3:], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequences", [[[0, 1, 2]], [[2], [0, 1]]], ids=["one sequence", "two, one of them padded"])
def test_the_loss_of_a_packed_batch_is_that_of_the_padded_one(model: Any, sequences: list[list[int]]) -> None:
    documents = [_document(1, 2, 3), _document(50, 51), _document(60, 61, 62, 63, 64, 65, 66)]
    packed = _loss(model, Corpus(documents, sequences), packed=True)
    padded = _loss(model, Corpus(documents, [[0], [1], [2]]), packed=False)
    assert packed == pytest.approx(padded, rel=1e-5)


def _loss(model: Any, corpus: Corpus, *, packed: bool) -> float:
    """The training loss of a corpus in one batch: the mean over all tokens that are learnt."""
    table = as_dataset(corpus)
    batch = Collator(PAD, packed=packed)([table[number] for number in range(len(table))])
    with torch.no_grad():
        return float(model(**model_inputs(batch), use_cache=False).loss)


def test_padding_of_a_packed_batch_changes_nothing(model: Any) -> None:
    documents = [_document(1, 2, 3), _document(50, 51), _document(60, 61, 62, 63, 64, 65, 66)]
    padded = _logits(model, Corpus(documents, [[0, 1], [2]]))
    alone = _logits(model, Corpus(documents, [[0, 1]]))
    torch.testing.assert_close(padded[0, :5], alone[0], rtol=1e-4, atol=1e-5)
