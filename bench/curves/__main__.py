"""Loss curves of ours, of the reference recipe, and of that in float32.

    python -m bench.curves MODEL [--name NAME] [--seeds 0 1 2]

MODEL is a shape of bench.models (random weights) or a folder with real ones. A process for each run, all at one time:
nothing is timed. Writes curves-NAME.json, .svg and .md with the verdict: is the difference within the reference's own,
from seed to seed? And which of both is nearer to what it would be if nothing were rounded? Every run that ended is
kept, and isn't run again with the same settings: what was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from bench.curves.verdict import VARIANTS, WINDOW, Result, verdict

COLOURS = {"ours": "tab:orange", "reference": "tab:blue", "float32": "tab:gray"}


def main() -> None:
    """Run both, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="(default: the model's)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=240, help="seconds that a run may take")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    options = parser.parse_args()
    name = options.name or Path(options.model).name
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"curves-{name}.json"
    setting = {"steps": options.steps, "rows": options.rows, "length": options.length}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    results: list[Result] = [run for run in kept if run["setting"] == setting]
    ended = {(run["variant"], run["seed"]) for run in results}
    missing = [each for each in product(VARIANTS, options.seeds) if each not in ended]
    with ThreadPoolExecutor(max(1, len(missing))) as pool:
        futures = [pool.submit(_run, *each, options.model, setting, options.limit) for each in missing]
        for future in as_completed(futures):
            if future.exception() is not None:
                continue  # raised below, once the others are kept
            results.append({**future.result(), "setting": setting})
            text = "[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n"
            path.write_text(text, encoding="utf-8")
    for future in futures:
        future.result()
    found = verdict(results)
    (options.out / f"curves-{name}.md").write_text(_page(name, found, results, options), encoding="utf-8")
    _picture(results, options.out / f"curves-{name}.svg")
    print(name, json.dumps(found))


def _run(variant: str, seed: int, model: str, setting: dict[str, int], limit: int) -> Result:
    """One run, in a process of its own. Exits where that fails; subprocess.TimeoutExpired after `limit` seconds."""
    numbers = [argument for name, value in setting.items() for argument in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.curves.worker", variant, model, *numbers, "--seed", str(seed)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
    if ran.returncode:
        raise SystemExit(f"{variant}, seed {seed}: the process ended with {ran.returncode}; what others did is kept")
    # transformers prints its own dictionaries between them
    return json.loads(next(line for line in ran.stdout.splitlines() if line.startswith('{"variant"')))  # type: ignore[no-any-return]


def _page(name: str, found: dict[str, Any], results: list[Result], options: argparse.Namespace) -> str:
    last, exact = found["lastLosses"], found["fromFloat32"]
    return (
        f"{name}: {options.steps} steps of {options.rows} × {options.length} tokens of real text, "
        f"{len(options.seeds)} seeds each, on {results[0]['gpu']}. Largest difference of two curves, averaged over "
        f"{WINDOW} steps: ours from the reference recipe at the same seed **{found['distance']:.4f}**, the reference's "
        f"own from seed to seed **{found['noise']:.4f}**: {'within' if found['within'] else 'NOT within'} its noise. "
        f"From the same recipe in float32: ours **{exact['ours']:.4f}**, the reference **{exact['reference']:.4f}**. "
        f"Loss over the last {WINDOW} steps: reference {last['reference']:.4f}, ours {last['ours']:.4f}.\n"
    )


def _picture(results: list[Result], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same results make the same file
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        colour = COLOURS[result["variant"]]
        label = result["variant"] if result["seed"] == results[0]["seed"] else None
        axes.plot(
            range(1, len(result["losses"]) + 1), result["losses"], color=colour, alpha=0.6, linewidth=1, label=label
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
