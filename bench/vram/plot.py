"""Predicted against measured, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure


def scatter(pairs: Sequence[tuple[float, float]]) -> str:
    """An SVG of (measured, predicted) pairs in GiB, with the line of no error and a band of five per cent."""
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same points make the same file
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    least = 2 ** math.floor(math.log2(min(min(pair) for pair in pairs)))
    most = 2 ** math.ceil(math.log2(max(max(pair) for pair in pairs)))
    line = [least, most]
    axes.fill_between(line, [0.95 * x for x in line], [1.05 * x for x in line], alpha=0.15, label="5 %")
    axes.plot(line, line, linewidth=1)
    axes.scatter([measured for measured, _ in pairs], [predicted for _, predicted in pairs], s=18, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line, aspect="equal")
    ticks = [2**power for power in range(int(math.log2(least)), int(math.log2(most)) + 1)]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_xlabel("measured, as the driver counts (GiB)")
    axes.set_ylabel("predicted (GiB)")
    axes.legend()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
