"""Packing: what shares a sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.packing import pack

CAPACITY = 64
lengths = st.lists(st.integers(min_value=1, max_value=CAPACITY), max_size=200)


@given(lengths)
def test_every_document_is_in_exactly_one_sequence(sizes: list[int]) -> None:
    assert sorted(index for sequence in pack(sizes, CAPACITY) for index in sequence) == list(range(len(sizes)))


@given(lengths)
def test_no_sequence_is_longer_than_the_capacity(sizes: list[int]) -> None:
    assert all(sum(sizes[index] for index in sequence) <= CAPACITY for sequence in pack(sizes, CAPACITY))


@given(lengths)
def test_no_two_sequences_would_fit_into_one(sizes: list[int]) -> None:
    filled = sorted(sum(sizes[index] for index in sequence) for sequence in pack(sizes, CAPACITY))
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


def test_a_document_goes_where_it_leaves_the_least_room() -> None:
    assert pack([50, 40, 14, 24], CAPACITY) == [[0, 2], [1, 3]]


def test_short_documents_fill_whole_sequences() -> None:
    assert len(pack([16] * 128_000, 2048)) == 1000
