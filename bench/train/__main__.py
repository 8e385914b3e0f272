"""Training speed side by side: `python -m bench.train [--quick] [--cases …] [--variants …] [--rounds N]`.

Every measurement is a process of its own, since what one leaves behind (patches, memory, compiled kernels) would be the
next one's. Variants alternate within a round, rounds follow each other, and the table shows medians. While one is
measured the next two import their libraries and wait for their turn. What --out holds already is gone on with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.train.cases import CASES, baseline
from bench.train.plots import write as write_plots
from bench.train.table import table

VARIANTS = ("reference", "unsloth", "ours")
DEFAULT_CASES = (
    "8b-offload", "8b-auto", "r1-offload", "r1-auto", "r2", "r2-auto", "7b-512", "8b-real-auto", "8b", "7b-512-auto",
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
    parser.add_argument(
        "--limit", type=int, default=300, help="seconds a measurement may take, its turn in the queue apart"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.warmup = 1, 10, 4

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {(found["variant"], found["case"], found["round"]) for found in results if "error" not in found}
    wanted = [
        (variant, case, number)
        for number in range(options.rounds)
        for variant, case in _measurements(options.variants, options.cases)
        if (variant, case, number) not in done
    ]
    with tempfile.NamedTemporaryFile() as turn, ThreadPoolExecutor(3) as pool:
        for result in pool.map(partial(_measure, options, turn.name), wanted):
            results.append(result)
            print(*(result.get(key) for key in ("variant", "case", "tokens_per_second", "error")), flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (options.out / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    write_plots(results, options.out)


def _measurements(variants: list[str], cases: list[str]) -> list[tuple[str, str]]:
    """Each variant of a case after the other. Cases that differ in our plan only share their baselines."""
    found: list[tuple[str, str]] = []
    for case in cases:
        for variant in variants:
            name = case if variant == "ours" else baseline(CASES[case]).name
            if (variant, name) not in found:
                found.append((variant, name))
    return found


def _measure(options: argparse.Namespace, turn: str, wanted: tuple[str, str, int]) -> dict[str, Any]:
    variant, case, number = wanted
    what = {"variant": variant, "case": case, "round": number}
    command = [
        sys.executable, "-m", "bench.train.worker", variant, case,
        "--steps", str(options.steps), "--warmup", str(options.warmup), "--turn", turn,
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=2 * options.limit)
    except subprocess.TimeoutExpired:
        return {**what, "error": f"took more than {options.limit} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {**what, "error": ran.stderr[-500:]}
    return {**json.loads(lines[-1]), "round": number}


if __name__ == "__main__":
    main()
