"""Start-up: from the trainer's process to the end of its first step. `python -m bench.startup [--shape NAME]`.

A model of random weights lies on local disk in 16 bit. The trainer is started as in a pod: with its files read from
disk (`disk`) or from memory (`memory`), without compiled kernels (`no cache`) or with those of the run before it
(`cache`). Beside it: which packages the imports spend their time on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.folders import save_model, save_rows
from bench.imports import Imports
from bench.jobs import Ran, plan_of, run_step, spec_of
from bench.models import SHAPES
from qlorajob.errors import ExitCode
from qlorajob.spec import QLoRAJobSpec

TARGETS = {"no cache": 25.0, "cache": 15.0}
"""Seconds of issue D, from local disk."""


def main() -> None:
    """Measure, and write startup.json, imports.json and startup.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--files", nargs="+", default=["memory", "disk"], choices=["memory", "disk"])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/bench-startup"), help="local disk")  # noqa: S108
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed"))
    options = parser.parse_args()
    spec = _spec(options)
    cpu = {"QLORA_DEVICE": "cpu"} if not torch.cuda.is_available() else {}
    ran = run_step("prepare", spec, options.scratch / "prepare", environment=cpu)
    if ran.report.prepared is None:
        raise SystemExit(ran.report.message)
    imports = Imports.measure()
    print(imports.table(), flush=True)
    results = []
    for files, compiled in product(options.files, ("no cache", "cache")):
        if compiled == "no cache":
            shutil.rmtree(options.scratch / "compiled", ignore_errors=True)
        if files == "disk":
            _forget(options.scratch / "model")
        trained = _train(spec, ran, options, cpu)
        results.append({"start": f"{files}, {compiled}", "shape": options.shape, **_parts(trained)})
        print(json.dumps(results[-1]), flush=True)
        _write(results, imports, options.out)


def _spec(options: argparse.Namespace) -> QLoRAJobSpec:
    model = save_model(SHAPES[options.shape], options.scratch / "model")
    data = save_rows(options.scratch / "rows.jsonl", 8 * options.rows, options.length)
    return spec_of(
        {
            "model": {"uri": f"file://{model}"},
            "dataset": {"uri": f"file://{data}", "format": "text"},
            "training": {
                "maxSteps": 2,
                "globalBatchSize": options.rows,
                "maxSequenceLength": options.length,
                "packing": True,
                "loggingSteps": 1,
                "saveSteps": 0,
            },
            "output": {"uri": f"file://{options.scratch / 'output'}"},
        }
    )


def _train(spec: QLoRAJobSpec, prepared: Ran, options: argparse.Namespace, environment: dict[str, str]) -> Ran:
    """One run, from nothing but the compiled kernels."""
    shutil.rmtree(options.scratch / "output", ignore_errors=True)
    shutil.rmtree(options.scratch / "train", ignore_errors=True)
    kernels = options.scratch / "compiled"
    ran = run_step(
        "train",
        spec,
        options.scratch / "train",
        plan=plan_of(spec, rows=options.rows, checkpointing="full"),
        prepared=prepared.report.prepared,
        environment={
            "TRITON_CACHE_DIR": str(kernels / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
            **environment,
        },
    )
    if ran.report.exit_code is not ExitCode.DONE:
        raise SystemExit(ran.report.message)
    return ran


def _forget(folder: Path) -> None:
    """Drop the files from the kernel's page cache, so that they come from disk."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _parts(ran: Ran) -> dict[str, Any]:
    """Seconds from the process's start: the trainer's own laps, what came before them, and the first step."""
    names = ("imports", "download", "data", "load", "setup", "base")
    laps = {name: ran.laps.get(name, 0.0) for name in names}
    first, second = ran.at("step 1 of"), ran.at("step 2 of")
    before = ran.at("imports done") - laps["imports"]
    return {
        "first step done": round(first, 2),
        "parts": {"interpreter": round(before, 2), **laps, "first step": round(first - before - sum(laps.values()), 2)},
        "second step": round(second - first, 2),
    }


def _write(results: list[dict[str, Any]], imports: Imports, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "startup.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "imports.json").write_text(json.dumps(asdict(imports), indent=1) + "\n", encoding="utf-8")
    parts = list(results[0]["parts"])
    lines = [
        f"| {results[0]['shape']}: files, kernels | {' | '.join(parts)} | **first step done** | target |",
        "|" + "---|" * (len(parts) + 3),
    ]
    for result in results:
        seconds = " | ".join(f"{result['parts'][part]:.1f}" for part in parts)
        target = TARGETS[result["start"].partition(", ")[2]]
        met = f"{target:.0f} s: {'met' if result['first step done'] <= target else 'missed'}"
        lines.append(f"| {result['start']} | {seconds} | **{result['first step done']:.1f}** | {met} |")
    (folder / "startup.md").write_text("\n".join(lines) + f"\n\nSeconds. {imports.table()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
