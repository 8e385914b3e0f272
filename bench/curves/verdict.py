"""Whether two trainers' loss curves differ by more than runs of one trainer do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

VARIANTS = ("ours", "reference", "float32")
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

    `fromFloat32`: how far both are from the recipe without rounding at the same seed, where that was run.

    Raises ValueError where runs didn't see the same rows in the same order, which would make this meaningless.
    """
    orders = {tuple(result["order"][: len(result["losses"])]) for result in results}
    if len(orders) != 1:
        raise ValueError("the runs saw different rows, or in another order")
    curves = {(result["variant"], result["seed"]): result["losses"] for result in results}
    seeds = sorted({seed for variant, seed in curves if variant == "reference"})

    def apart(one: str, other: str) -> list[float]:
        both = [seed for seed in seeds if (one, seed) in curves and (other, seed) in curves]
        return [distance(curves[one, seed], curves[other, seed]) for seed in both]

    ours = apart("ours", "reference")
    noise = [distance(curves["reference", one], curves["reference", other]) for one, other in combinations(seeds, 2)]
    if not ours or not noise:
        raise ValueError("there must be two seeds of the reference, and one of ours with the same seed")
    return {
        "distance": max(ours),
        "noise": max(noise),
        "within": max(ours) <= max(noise),
        "fromFloat32": {
            variant: max(found) for variant in ("reference", "ours") if (found := apart(variant, "float32"))
        },
        "lastLosses": {
            variant: float(np.mean([curve[-WINDOW:] for (kind, _), curve in curves.items() if kind == variant]))
            for variant in ("reference", "ours")
        },
    }
