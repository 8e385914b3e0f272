"""QLoRA against 16-bit LoRA on real weights: `python -m bench.quality [--seeds 1 2 3] [--ranks 16 64] [--steps N] …`.

Every run's result is a file of its own, and a run whose file is there, under the same settings, isn't run again: what
was cut off goes on. The page tells of all that was ever run. Runs on a GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import weights
from bench.quality import data
from bench.quality.report import page, picture
from bench.quality.run import Kind, Setting, run
from cluster.layout import cache_directory

MODEL = weights.default_destination()


def main() -> None:
    """Run what isn't there yet; write the page of every setting that has both kinds for each of its seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--model",
        type=_absolute,
        default=str(MODEL),
        help="a folder (default: SmolLM2-135M-Instruct of dev/weights.py)",
    )
    parser.add_argument("--data", type=_absolute, help="instruction and output (default: bench.quality.data's)")
    for name in ("steps", "rank"):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[_default(name)], help="each with each")
    for name in ("rows", "length", "looks"):
        parser.add_argument(f"--{name}", type=int, default=_default(name))
    parser.add_argument("--learning-rate", type=float, default=_default("learning_rate"))
    parser.add_argument("--workers", type=int, default=1, help="runs at one time")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of quality.md and quality/")
    options = parser.parse_args()
    folder = options.out / "quality"
    settings = [
        Setting(
            model=options.model, data=options.data or str(data.write(cache_directory())),
            steps=steps, rows=options.rows, length=options.length, rank=rank, looks=options.looks,
            learning_rate=options.learning_rate,
        )
        for steps, rank in product(options.steps, options.rank)
    ]  # fmt: skip
    _run_missing(list(product(settings, options.seeds, get_args(Kind))), folder, options.workers)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]
    (options.out / "quality.md").write_text(page(results), encoding="utf-8")
    picture(results, folder / "curves.svg")


def _absolute(path: str) -> str:
    """As a file:// URI wants it."""
    return str(Path(path).resolve())


def _default(name: str) -> Any:
    return next(field.default for field in fields(Setting) if field.name == name)


def _run_missing(wanted: list[tuple[Setting, int, Kind]], folder: Path, workers: int) -> None:
    """Each in a process of its own, so many at one time. Every result is kept as soon as it is there."""
    missing = [each for each in wanted if not _is_there(*each, folder)]
    if not missing:
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, kind, seed, setting): (setting, seed, kind) for setting, seed, kind in missing}
        for future in as_completed(futures):
            if future.exception() is not None:
                continue  # raised below, once the others are kept
            path = _path(*futures[future], folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(future.result()) + "\n", encoding="utf-8")
            print(path.parent.name, path.stem, future.result()["validation"][-1], flush=True)
    for future in futures:
        future.result()


def _is_there(setting: Setting, seed: int, kind: Kind, folder: Path) -> bool:
    path = _path(setting, seed, kind, folder)
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["setting"] == setting.common())


def _path(setting: Setting, seed: int, kind: Kind, folder: Path) -> Path:
    return folder / f"{Path(setting.data).stem}-rank-{setting.rank}-steps-{setting.steps}" / f"{kind}-{seed}.json"


if __name__ == "__main__":
    main()
