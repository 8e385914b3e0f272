"""From the runs' results to the verdict, a page and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

Result = dict[str, Any]
ALLOWED = 0.01
"""Relative difference of the mean validation losses up to which QLoRA counts as level with LoRA."""


def final(result: Result) -> float:
    """Validation loss after the last step."""
    return float(result["validation"][-1][1])


def by_rank(results: Sequence[Result]) -> dict[int, list[Result]]:
    """Results by the adapter's rank, the lowest first."""
    ranks = sorted({result["setting"]["rank"] for result in results})
    return {rank: [result for result in results if result["setting"]["rank"] == rank] for rank in ranks}


def by_kind(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by kind, in the order of their seeds."""
    found: dict[str, list[Result]] = {"lora": [], "qlora": []}
    for result in sorted(results, key=lambda each: each["seed"]):
        found[result["kind"]].append(result)
    return found


def verdict(results: Sequence[Result]) -> tuple[float, float]:
    """QLoRA's mean validation loss relative to LoRA's, minus one; and the same for the bases, before any training."""
    kinds = by_kind(results)
    after = [statistics.mean(final(each) for each in kinds[kind]) for kind in ("qlora", "lora")]
    before = [statistics.mean(each["validation"][0][1] for each in kinds[kind]) for kind in ("qlora", "lora")]
    return after[0] / after[1] - 1, before[0] / before[1] - 1


def page(results: Sequence[Result], command: str) -> str:
    """docs/results/quality.md. Every seed must have both kinds, at every rank."""
    one = results[0]
    setting, ranks = one["setting"], by_rank(results)
    named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    lines = [
        "# QLoRA beside 16-bit LoRA",
        "",
        f"{setting['model']}, real weights, on ISO 639-3 as an instruction set (the demo's question about every "
        f"language: {one['rows'][0]:,} rows to train, {one['rows'][1]} held out, {one['validationTokens']:,} "
        f"validation tokens); {named}, {setting['steps']} steps of {setting['rows']} × "
        f"{setting['length']} tokens, learning rate {setting['learning_rate']:g}; on {one['device']}. For each seed "
        "both kinds begin with the same "
        "adapter and see the same rows in the same order, so a difference is the base's 4 bit.",
    ]
    for rank, found in ranks.items():
        lines += ["", *([f"## Rank {rank}", ""] if len(ranks) > 1 else []), *_table(found)]
    lines += [
        "",
        "![validation loss](quality/curves.svg)",
        "",
        "```sh",
        command,
        "```",
        "",
        "One JSON file for each run is in `quality/`; a run whose file is there isn't run again.",
    ]
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result]) -> list[str]:
    """Every seed's losses, their means, and whether these are level."""
    kinds = by_kind(results)
    difference, untrained = verdict(results)
    level = "met" if abs(difference) <= ALLOWED else "missed"
    lines = [
        "| seed | 16-bit LoRA: validation loss | QLoRA (NF4): validation loss | difference |",
        "|---|---|---|---|",
    ]
    for lora, qlora in zip(kinds["lora"], kinds["qlora"], strict=True):
        lines.append(
            f"| {lora['seed']} | {final(lora):.4f} | {final(qlora):.4f} | {final(qlora) / final(lora) - 1:+.2%} |"
        )
    means = [statistics.mean(map(final, kinds[kind])) for kind in ("lora", "qlora")]
    return [
        *lines,
        f"| **mean** | **{means[0]:.4f}** | **{means[1]:.4f}** | **{difference:+.2%}** |",
        f"| before training | {kinds['lora'][0]['validation'][0][1]:.4f} | {kinds['qlora'][0]['validation'][0][1]:.4f} "
        f"| {untrained:+.2%} |",
        "",
        f"Target: the means within {ALLOWED:.0%}: **{level}**. "
        f"Seeds differ among themselves by up to {_spread(kinds['lora']):.2%} (LoRA) and "
        f"{_spread(kinds['qlora']):.2%} (QLoRA).",
    ]


def _spread(results: Sequence[Result]) -> float:
    losses = [final(result) for result in results]
    return max(losses) / min(losses) - 1


def picture(results: Sequence[Result], path: Path) -> None:
    """Validation loss over steps, a line for each run."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same results make the same file
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    ranks = by_rank(results)
    for (rank, found), style in zip(ranks.items(), cycle(("-", "--", ":", "-.")), strict=False):
        suffix = f", rank {rank}" if len(ranks) > 1 else ""
        for kind, colour, name in (("lora", "tab:blue", "16-bit LoRA"), ("qlora", "tab:orange", "QLoRA (NF4)")):
            for number, result in enumerate(by_kind(found)[kind]):
                steps, losses = zip(*result["validation"], strict=True)
                label = None if number else name + suffix
                axes.plot(steps, losses, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss (nats a token)")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})
