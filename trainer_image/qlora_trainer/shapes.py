"""The shapes of micro batches on a GPU: the fewer the better, since graphs and free memory are kept by shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from qlora_vram.fast import GRAPH_TOKENS
from qlora_vram.workload import LENGTH_MULTIPLE

POOLS: Final = 3
"""Where shapes change, graphs and what runs between them hold up to so many micro batches' memory (measured: 2.6)."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What micro batches may look like."""

    rows: int
    lengths: frozenset[int]
    """Tokens of a row, padding included."""
    planned: int
    """Tokens of the longest row that there is memory for."""
    steady: bool
    """All micro batches have the longest length."""

    @classmethod
    def of(cls, rows: int, lengths: Iterable[int], longest: int, *, packed: bool) -> Shapes:
        """Of sequences of these lengths, none of them longer than `longest`. Packed ones are all but full.

        Two things still make a second shape of steady ones: an epoch's last micro batch, which may have fewer rows, and
        packed rows with twice as many documents (`fast.step.Inputs.rounded`). They run beside the graphs.
        """
        found = frozenset(_padded(length) for length in lengths)
        return cls(rows, found, _padded(longest), steady=packed or len(found) == 1)

    @property
    def multiple(self) -> int:
        """What every length is filled up to a multiple of: packed sequences to the longest, so that they are alike."""
        return max(self.lengths) if self.steady else LENGTH_MULTIPLE

    @property
    def replayable(self) -> bool:
        """Whether micro batches may be replayed as CUDA graphs, in the memory that was planned.

        A graph's memory is its own. What a shape without a graph takes comes on top, unless there is one shape alone.
        """
        longest = max(self.lengths)
        room = self.steady or POOLS * longest <= self.planned
        return room and self.rows * longest <= GRAPH_TOKENS


def _padded(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
