"""The five recipes at their real shapes: `python -m bench.recipes [r0 …] [--steps 30]`.

Each measurement is a process of its own; those of the recipe's own lengths come first, then rows of full length, which
is what a plan has to hold. Writes recipes.json and recipes.md; what is in recipes.json already and isn't measured now
stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.recipes.cases import RECIPES
from bench.recipes.report import page

FULL_STEPS = 6
"""Enough for a peak and a speed."""


def main() -> None:
    """Measure, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=sorted(RECIPES), metavar="recipe")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=150, help="seconds a measurement may take")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: to try the command")
    parser.add_argument("--missing", action="store_true", help="measure only what recipes.json hasn't, or no more")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "recipes.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    counts = [each for each in found if options.missing and not {"error", "outdated"} & each.keys()]
    there = {(each["recipe"], each["lengths"]) for each in counts}
    for full in (False, True):
        for name in options.recipes:
            if (name, "full" if full else "recipe") in there:
                continue
            result = _measure(name, options, full=full)
            print(name, result["lengths"], result.get("samplesPerSecond", result.get("error")), flush=True)
            found = [each for each in found if (each["recipe"], each["lengths"]) != (name, result["lengths"])] + [
                result
            ]
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (options.out / "recipes.md").write_text(page(found), encoding="utf-8")


def _measure(name: str, options: argparse.Namespace, *, full: bool) -> dict[str, Any]:
    steps = min(options.steps, FULL_STEPS) if full else options.steps
    command = [sys.executable, "-m", "bench.recipes.worker", name, "--steps", str(steps)]
    command += ["--full"] * full + ["--tiny"] * options.tiny
    failed = {"recipe": name, "lengths": "full" if full else "recipe"}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {**failed, "error": f"took more than {options.limit} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {**failed, "error": ran.stderr[-500:]}


if __name__ == "__main__":
    main()
