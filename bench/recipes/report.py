"""docs/results/recipes.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.recipes.cases import RECIPES
from bench.recipes.predictions import error, measured, planned
from qlora_vram.memory import peak

HEAD = """# The five recipes, measured

Each manifest of `examples/` at its model's real shape with random weights, at its own settings, through the planner and
the trainer's own code. Memory is of one run in a process of its own: what the driver counts as used (in brackets
torch's peaks of allocated and reserved memory), in GB of 10⁹ bytes; the step is the median, without the first.
Predicted is what the memory model says of the longest row that there was, planned what it says of rows of
maxSequenceLength, which is what a pod is sized by; both as of the commit that wrote this page.

```sh
python -m bench.recipes      # on a GPU, with PYTHONPATH=.:operator:trainer_image → recipes.json and this page
```
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """All that was measured, and on what."""
    done = [result for result in results if "error" not in result]
    machines = ", ".join(sorted({result["gpu"] for result in done}))
    parts = [HEAD, f"Measured on: {machines or 'nothing yet'}.", ""]
    for lengths, title in (
        (
            "recipe",
            "## Rows as long as the recipe's\n\nLengths are log-normal estimates of each data set, cut at the limit.",
        ),
        ("full", "## Every row as long as maxSequenceLength\n\nWhat a plan has to hold."),
    ):
        parts += [title, "", *_table([result for result in results if result["lengths"] == lengths]), ""]
    parts += [f"- {recipe.name}: {recipe.note}." for recipe in RECIPES.values() if recipe.note]
    return "\n".join(parts) + "\n"


def _table(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | rows × tokens | path | peak GB (allocated, reserved) | predicted GB (error) | planned GB | step "
        "| samples/s | tokens/s | the recipe's claim |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda each: each["recipe"]):
        recipe = RECIPES[result["recipe"]]
        if "error" in result:
            lines.append(f"| {recipe.name} | failed: {result['error'].strip().splitlines()[-1][:120]} |")
            continue
        gb = {name: result[name] / 1e9 for name in ("driver", "allocated", "reserved")}
        own, whole = (peak(work).total / 1e9 for work in (measured(result), planned(result)))
        rows = f"{result['microBatch']} × {result['accumulation']} × {result['meanLength']:.0f} (≤ {result['length']})"
        lines.append(
            f"| {recipe.name}: {recipe.model.rpartition('/')[2]} | {rows} | {result['path']} "
            f"| {gb['driver']:.1f} ({gb['allocated']:.1f}, {gb['reserved']:.1f}) | {own:.1f} ({error(result):+.1%}) "
            f"| {whole:.1f} | {result['stepSeconds']:.2f} s | {result['samplesPerSecond']:.1f} "
            f"| {result['tokensPerSecond']:,.0f} | {recipe.claim} |"
        )
    marked = [result for result in results if "outdated" in result]
    return [*lines, "", *(f"- {result['recipe']}: outdated. {result['outdated']}" for result in marked)]
