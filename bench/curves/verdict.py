"""Whether two trainers' loss curves differ by more than runs of one trainer do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

WINDOW = 10
"""Steps that are averaged, so that one batch doesn't decide."""

Result = dict[str, Any]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two curves, averaged over WINDOW steps, wherever in the run it is."""
    window = min(WINDOW, len(one))
    mean = np.ones(window) / window
    difference = np.asarray(one) - np.asarray(other)
    return float(np.abs(np.convolve(difference, mean, "valid")).max())


def verdict(results: Sequence[Result]) -> dict[str, Any]:
    """Distance of ours from the reference at the same seed; noise: the reference's own between seeds.

    Raises ValueError where runs didn't see the same rows in the same order, which would make this meaningless.
    """
    orders = {tuple(result["order"][: len(result["losses"])]) for result in results}
    if len(orders) != 1:
        raise ValueError("the runs saw different rows, or in another order")
    curves = {(result["variant"], result["seed"]): result["losses"] for result in results}
    seeds = sorted({seed for variant, seed in curves if variant == "reference"})
    ours = [distance(curves["ours", seed], curves["reference", seed]) for seed in seeds if ("ours", seed) in curves]
    noise = [distance(curves["reference", one], curves["reference", other]) for one, other in combinations(seeds, 2)]
    if not ours or not noise:
        raise ValueError("there must be two seeds of the reference, and one of ours with the same seed")
    return {
        "distance": max(ours),
        "noise": max(noise),
        "within": max(ours) <= max(noise),
        "lastLosses": {
            variant: float(np.mean([curve[-WINDOW:] for (kind, _), curve in curves.items() if kind == variant]))
            for variant in ("reference", "ours")
        },
    }
