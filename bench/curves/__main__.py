"""Loss curves of ours and of the reference recipe: `python -m bench.curves MODEL [--name NAME] [--seeds 0 1 2]`.

MODEL is a shape of bench.models (random weights) or a folder with real ones. A process for each trainer. Writes
curves-NAME.json, .svg and .md with the verdict: is the difference within the reference's own, from seed to seed?
Every run that ended is kept, and isn't run again with the same settings: what was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.curves.verdict import WINDOW, Result, verdict


def main() -> None:
    """Run both, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="(default: the model's)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=240, help="seconds that one trainer's runs may take")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    options = parser.parse_args()
    name = options.name or Path(options.model).name
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"curves-{name}.json"
    setting = {"steps": options.steps, "rows": options.rows, "length": options.length}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    results: list[Result] = [run for run in kept if run["setting"] == setting]
    for variant in ("ours", "reference"):
        ended = {run["seed"] for run in results if run["variant"] == variant}
        missing = [seed for seed in options.seeds if seed not in ended]
        for run in _runs(variant, options.model, missing, setting, options.limit):
            results.append({**run, "setting": setting})
            text = "[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n"
            path.write_text(text, encoding="utf-8")
    found = verdict(results)
    (options.out / f"curves-{name}.md").write_text(_page(name, found, results, options), encoding="utf-8")
    _picture(results, options.out / f"curves-{name}.svg")
    print(name, json.dumps(found))


def _runs(variant: str, model: str, seeds: list[int], setting: dict[str, int], limit: int) -> Iterator[Result]:
    """Each seed's result as soon as it is there. Exits where the trainer failed or took longer than `limit` seconds."""
    if not seeds:
        return
    numbers = [argument for name, value in setting.items() for argument in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.curves.worker", variant, model, *numbers, "--seeds", *map(str, seeds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        timer = threading.Timer(limit, worker.kill)
        timer.start()
        for line in worker.stdout or ():
            if line.startswith('{"variant"'):  # transformers prints its own dictionaries between them
                yield json.loads(line)
        timer.cancel()
    if worker.returncode:
        raise SystemExit(f"{variant}: the process ended with {worker.returncode}; what it did before is kept")


def _page(name: str, found: dict[str, Any], results: list[Result], options: argparse.Namespace) -> str:
    last = found["lastLosses"]
    return (
        f"{name}: {options.steps} steps of {options.rows} × {options.length} tokens of real text, "
        f"{len(options.seeds)} seeds each, on {results[0]['gpu']}. Largest difference of two curves, averaged over "
        f"{WINDOW} steps: ours from the reference recipe at the same seed **{found['distance']:.4f}**, the reference's "
        f"own from seed to seed **{found['noise']:.4f}**: {'within' if found['within'] else 'NOT within'} its noise. "
        f"Loss over the last {WINDOW} steps: reference {last['reference']:.4f}, ours {last['ours']:.4f}.\n"
    )


def _picture(results: list[Result], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same results make the same file
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        colour = "tab:orange" if result["variant"] == "ours" else "tab:blue"
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
