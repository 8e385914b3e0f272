"""Duplicates and the validation split."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.selection import held_out, repeated

digests = st.lists(st.integers(0, 12), max_size=60).map(lambda values: np.array(values, np.uint64))
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(digests)
def test_of_equal_documents_the_first_is_kept(values: np.ndarray) -> None:
    kept = values[~repeated(values)].tolist()
    assert kept == list(dict.fromkeys(values.tolist()))


@given(digests, fractions)
def test_equal_documents_are_on_one_side(values: np.ndarray, fraction: float) -> None:
    mask = held_out(values, fraction)
    assert not set(values[mask].tolist()) & set(values[~mask].tolist())


@given(digests, fractions)
def test_both_sides_get_something_where_two_differ(values: np.ndarray, fraction: float) -> None:
    mask = held_out(values, fraction)
    assert (mask.any() and not mask.all()) == (len(set(values.tolist())) > 1)


@given(digests, fractions, st.randoms())
def test_the_order_of_the_documents_plays_no_part(values: np.ndarray, fraction: float, random: object) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = [sorted(some[held_out(some, fraction)].tolist()) for some in (values, shuffled)]
    assert chosen[0] == chosen[1]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60, unique=True), fractions)
def test_of_different_documents_exactly_the_share_is_held_out(values: list[int], fraction: float) -> None:
    mask = held_out(np.array(values, np.uint64), fraction)
    assert mask.sum() == min(max(1, round(len(values) * fraction)), len(values) - 1)


@given(digests, fractions)
def test_the_share_is_exceeded_only_by_the_smallest_group(values: np.ndarray, fraction: float) -> None:
    held = int(held_out(values, fraction).sum())
    sizes = np.unique(values, return_counts=True)[1]
    if len(sizes) > 1:
        assert held <= max(round(len(values) * fraction), 1, sizes.min())
