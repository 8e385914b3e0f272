"""Training speed side by side: `python -m bench.train [--quick] [--cases …] [--variants …] [--rounds N]`.

Every measurement is a process of its own, since what one leaves behind (patches, memory, compiled kernels) would be the
next one's. Variants alternate within a round, rounds follow each other, and the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.train.cases import CASES, baseline
from bench.train.table import table

VARIANTS = ("reference", "unsloth", "ours")
DEFAULT_CASES = (
    "8b-offload", "8b", "8b-auto", "r1-offload", "r1-auto", "r2", "r2-auto", "7b-512", "7b-512-auto", "8b-real-auto",
)  # fmt: skip


def main() -> None:
    """Measure, and write results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, choices=sorted(CASES))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one round of 10 steps: for development")
    parser.add_argument("--limit", type=int, default=300, help="seconds a measurement may take")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.warmup = 1, 10, 4

    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for variant, case in _measurements(options.variants, options.cases):
            result = {**_measure(variant, case, options), "round": number}
            results.append(result)
            print(variant, case, result.get("tokens_per_second", result.get("error")), flush=True)
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (options.out / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def _measurements(variants: list[str], cases: list[str]) -> list[tuple[str, str]]:
    """Each variant of a case after the other. Cases that differ in our plan only share their baselines."""
    found: list[tuple[str, str]] = []
    for case in cases:
        for variant in variants:
            name = case if variant == "ours" else baseline(CASES[case]).name
            if (variant, name) not in found:
                found.append((variant, name))
    return found


def _measure(variant: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "bench.train.worker", variant, case,
        "--steps", str(options.steps), "--warmup", str(options.warmup),
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"variant": variant, "case": case, "error": f"took more than {options.limit} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"variant": variant, "case": case, "error": ran.stderr[-500:]}
    return json.loads(lines[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
