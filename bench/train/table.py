"""From measurements to a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.train.cases import CASES, baseline

Result = dict[str, Any]


def medians(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
    """By variant and case: the median of each number over all rounds that succeeded."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if "error" not in result:
            groups.setdefault((result["variant"], result["case"]), []).append(result)
    names = ("tokens_per_second", "allocated_gib", "driver_gib", "loss")
    return {
        key: {name: statistics.median(run[name] for run in runs if run[name] is not None) for name in names}
        for key, runs in groups.items()
    }


def table(results: Sequence[Result]) -> str:
    """Markdown: a line for each of our cases, beside the baselines of its setting."""
    found = medians(results)
    lines = [
        "| case | reference tok/s (GiB) | Unsloth tok/s (GiB) | ours tok/s (GiB) | ÷ reference | ÷ Unsloth |",
        "|---|---|---|---|---|---|",
    ]
    ours = [case for case in CASES if ("ours", case) in found]
    for case in ours:
        name = baseline(CASES[case]).name
        row = [found.get(("reference", name)), found.get(("unsloth", name)), found["ours", case]]
        ratios = [_ratio(row[2], row[0]), _ratio(row[2], row[1])]
        lines.append(f"| {' | '.join([case, *map(_cell, row), *ratios])} |")
    return "\n".join(lines) + "\n\nIn brackets: peak that torch allocated.\n"


def _cell(result: Result | None) -> str:
    return "–" if result is None else f"{result['tokens_per_second']:,.0f} ({result['allocated_gib']:.1f})"


def _ratio(one: Result | None, other: Result | None) -> str:
    if one is None or other is None:
        return "–"
    return f"{one['tokens_per_second'] / other['tokens_per_second']:.2f}"
