"""The results as pictures: `python -m bench.train.plots [RESULTS.json]` writes speed.svg and memory.svg beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.train.cases import CASES, baseline
from bench.train.table import Result, medians

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"reference": "tab:gray", "unsloth": "tab:blue", "ours": "tab:orange"}


def bars(results: Sequence[Result], number: str, label: str) -> Figure:
    """Each of our cases beside its baselines, by one of the medians' numbers."""
    import matplotlib  # a GPU machine may lack it
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same results make the same file
    found = medians(results)
    cases = [case for case in CASES if ("ours", case) in found]
    figure = Figure(figsize=(9, 0.5 + 0.6 * max(2, len(cases))), layout="constrained")
    axes = figure.add_subplot()
    for place, (variant, colour) in enumerate(COLOURS.items()):
        names = [case if variant == "ours" else baseline(CASES[case]).name for case in cases]
        values = [found.get((variant, name), {}).get(number, 0) for name in names]
        drawn = axes.barh(
            [row + 0.27 * (place - 1) for row in range(len(cases))], values, 0.25, color=colour, label=variant
        )
        axes.bar_label(drawn, labels=[f"{value:,.4g}" if value else "" for value in values], fontsize=7, padding=2)
    axes.set_yticks(range(len(cases)), labels=cases)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend()
    return figure


def write(results: Sequence[Result], folder: Path) -> None:
    """Both pictures."""
    for number, label, name in (
        ("tokens_per_second", "useful tokens per second", "speed.svg"),
        ("allocated_gib", "peak allocated (GiB)", "memory.svg"),
    ):
        bars(results, number, label).savefig(folder / name, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/speed/results.json")
    write(json.loads(path.read_text(encoding="utf-8")), path.parent)
