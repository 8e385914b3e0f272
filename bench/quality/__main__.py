"""QLoRA against 16-bit LoRA on real weights: `python -m bench.quality [--seeds 1 2 3] [--ranks 16 64] [--steps N] …`.

Every run's result is a file of its own, and a run whose file is there, under the same settings, isn't run again: what
was cut off goes on. Runs on a GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import weights
from bench.quality import data
from bench.quality.report import page, picture
from bench.quality.run import Kind, Setting, run
from cluster.layout import cache_directory

MODEL = weights.default_destination()


def main() -> None:
    """Run what isn't there yet; write the page when every seed has both kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--model",
        type=_absolute,
        default=str(MODEL),
        help="a folder (default: SmolLM2-135M-Instruct of dev/weights.py)",
    )
    parser.add_argument("--data", type=_absolute, help="JSON Lines (default: made here, by bench.quality.data)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[_default("rank")], help="each is run for every seed")
    for name in ("steps", "rows", "length", "looks"):
        parser.add_argument(f"--{name}", type=int, default=_default(name))
    parser.add_argument("--learning-rate", type=float, default=_default("learning_rate"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of quality.md and quality/")
    options = parser.parse_args()
    folder = options.out / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    first, *_ = settings = [
        Setting(
            model=options.model, data=options.data or str(data.write(cache_directory())),
            steps=options.steps, rows=options.rows, length=options.length, rank=rank, looks=options.looks,
            learning_rate=options.learning_rate,
        )
        for rank in options.ranks
    ]  # fmt: skip
    results = [
        _result(kind, seed, setting, folder)
        for setting in settings
        for seed in options.seeds
        for kind in get_args(Kind)
    ]
    command = _command(first, options.seeds, options.ranks)
    (options.out / "quality.md").write_text(page(results, command), encoding="utf-8")
    picture(results, folder / "curves.svg")


def _absolute(path: str) -> str:
    """As a file:// URI wants it."""
    return str(Path(path).resolve())


def _default(name: str) -> Any:
    return next(field.default for field in fields(Setting) if field.name == name)


def _result(kind: Kind, seed: int, setting: Setting, folder: Path) -> dict[str, Any]:
    rank = "" if setting.rank == _default("rank") else f"-rank-{setting.rank}"
    path = folder / f"{kind}-{seed}{rank}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["setting"] == setting.common():
            return found
    result = run(kind, seed, setting)
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(kind, seed, "validation", result["validation"], f"{result['seconds']} s", flush=True)
    return result


def _command(setting: Setting, seeds: list[int], ranks: list[int]) -> str:
    changed = [
        f" --{field.name.replace('_', '-')} {getattr(setting, field.name)}"
        for field in fields(Setting)
        if field.name not in ("model", "data", "rank") and getattr(setting, field.name) != field.default
    ]
    if ranks != [_default("rank")]:
        changed.append(f" --ranks {' '.join(map(str, ranks))}")
    return f"python -m bench.quality --seeds {' '.join(map(str, seeds))}{''.join(changed)}"


if __name__ == "__main__":
    main()
