"""How long the rows are, in few numbers."""

from __future__ import annotations

import numpy as np

from qlora_trainer.corpus import Numbers

SHORTEST_BUCKET = 16


def histogram(lengths: Numbers) -> dict[str, int]:
    """Rows by length: a power of two → rows that are at most so long, and longer than the one before.

    Starts at 16 and ends with the longest row, so it has at most 17 entries for rows of up to a million tokens.
    """
    if not len(lengths):
        return {}
    steps = max(0, int(np.ceil(np.log2(lengths.max() / SHORTEST_BUCKET))))
    bounds = [SHORTEST_BUCKET << step for step in range(steps + 1)]
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    return {str(bound): int(count) for bound, count in zip(bounds, counts, strict=True)}
