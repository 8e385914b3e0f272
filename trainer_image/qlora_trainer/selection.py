"""Which documents are trained on and which are held out. Pure: digests in, masks out.

A document's digest stands for what it teaches: rows with the same tokens and labels have the same one. Digests are
keyed with training.seed, so their order is the seed's shuffle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Digests = np.ndarray[Any, np.dtype[np.uint64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def repeated(digests: Digests) -> Mask:
    """Documents that an earlier one equals."""
    mask = np.ones(len(digests), bool)
    mask[np.unique(digests, return_index=True)[1]] = False
    return mask


def held_out(digests: Digests, fraction: float) -> Mask:
    """A share of the documents. Equal ones stay together, so that none is on both sides; their order plays no part.

    At most the share is drawn, but at least one group of equal documents; none where all documents are equal.
    """
    values, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    if len(values) < 2:
        return np.zeros(len(digests), bool)
    left = min(max(1, round(len(digests) * fraction)), len(digests) - 1)
    chosen = np.zeros(len(values), bool)
    for index, size in enumerate(sizes):
        if size <= left:
            chosen[index] = True
            left -= size
        if not left:
            break
    if not chosen.any():
        chosen[sizes.argmin()] = True
    return chosen[group]
