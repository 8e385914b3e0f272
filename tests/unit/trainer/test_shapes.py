"""Which shapes micro batches have on a GPU, and whether they may be replayed as graphs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.shapes import POOLS, Shapes
from qlora_vram.fast import GRAPH_TOKENS
from qlora_vram.workload import LENGTH_MULTIPLE

LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=20)


@given(LENGTHS)
def test_packed_sequences_are_all_filled_up_to_the_longest(lengths: list[int]) -> None:
    shapes = Shapes.of(1, lengths, 4096, packed=True)
    assert shapes.steady
    assert shapes.multiple % LENGTH_MULTIPLE == 0
    assert 0 <= shapes.multiple - max(lengths) < LENGTH_MULTIPLE


@given(LENGTHS)
def test_rows_are_filled_up_no_further_than_they_must(lengths: list[int]) -> None:
    shapes = Shapes.of(1, lengths, 4096, packed=False)
    assert shapes.multiple == LENGTH_MULTIPLE or shapes.steady


@pytest.mark.parametrize(
    ("rows", "lengths", "longest", "packed", "replayable"),
    [
        pytest.param(4, [1024], 1024, False, True, id="one length"),
        pytest.param(4, [300, 1000], 1024, True, True, id="packed"),
        pytest.param(4, [300, 1000], 1024, False, False, id="lengths that change, as long as planned"),
        pytest.param(4, [60, 120, 190], 1024, False, True, id="lengths that change, much shorter than planned"),
        pytest.param(8, [1024], 1024, False, False, id="so large that launching doesn't matter"),
    ],
)
def test_graphs_are_for_small_micro_batches_in_the_memory_that_is_planned(
    rows: int, lengths: list[int], longest: int, packed: bool, replayable: bool
) -> None:
    assert Shapes.of(rows, lengths, longest, packed=packed).replayable is replayable


@given(LENGTHS, st.integers(1, 8), st.booleans())
def test_graphs_never_take_more_than_is_planned(lengths: list[int], rows: int, packed: bool) -> None:
    shapes = Shapes.of(rows, lengths, 4096, packed=packed)
    if shapes.replayable:
        pools = 1 if shapes.steady else POOLS
        assert pools * max(shapes.lengths) <= max(shapes.planned, max(shapes.lengths))
        assert rows * max(shapes.lengths) <= GRAPH_TOKENS
