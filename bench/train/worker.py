"""Measurements in a process of their own: `python -m bench.train.worker VARIANT CASE... [--steps N] [--profile]`.

Each case's result is a line of JSON, the last lines of the output. A case that fails is a line with its error.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=["ours", "reference", "unsloth"])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--turn", type=Path, help="a file to lock between the imports and the first use of the GPU")
    options = parser.parse_args()

    if options.variant == "ours":  # before CUDA starts, as the trainer does it
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.variant == "unsloth":
        import unsloth  # noqa: F401 - it wants to come before transformers

    import torch

    import bench.train.variants  # noqa: F401 - so that the first case's time isn't that of imports

    if options.turn:
        turn = options.turn.open("w")
        fcntl.flock(turn, fcntl.LOCK_EX)  # until this process ends
    imported = round(time.monotonic() - BEGAN, 1)
    for name in options.cases:
        try:
            result = measure(options.variant, name, options.steps, options.warmup, profile=options.profile)
        except Exception as error:
            traceback.print_exc()
            result = {"variant": options.variant, "case": name, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({**result, "import_seconds": imported}), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(variant: str, name: str, steps: int, warmup: int, *, profile: bool) -> dict[str, Any]:
    """One case: median step after the warm-up, tokens that count, memory as torch and as the driver count it."""
    import torch

    from bench.models import SHAPES
    from bench.train.cases import CASES
    from bench.train.clock import StepClock
    from bench.train.profile import components
    from bench.train.variants import run

    case = CASES[name]
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()  # without one, a tiny case tries this code and measures nothing of worth
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock(warmup)
    began = time.monotonic()
    found = run(variant, case, steps, clock)
    trainer = found.pop("trainer")
    seconds = clock.median()
    result = {
        "variant": variant,
        "case": name,
        **found,
        "step_seconds": round(seconds, 5),
        "fastest_step": round(min(clock.seconds()), 5),
        "tokens_per_second": round(found["tokens"] / seconds, 1),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else 0,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else 0,
        "driver_gib": round(_driver_bytes() / 2**30, 2) if on_gpu else 0,
        "loss": clock.losses[-1] if clock.losses else None,
        "bound_tokens_per_second": round(790e12 / (4 * SHAPES[case.shape].multiplied)),
        "seconds": round(time.monotonic() - began, 1),
        "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
    }
    if profile:
        result["profile"] = components(trainer)
    return result


def _driver_bytes() -> int:
    """What the driver counts for this process. Those that wait for their turn may have started CUDA already."""
    import pynvml
    import torch

    free, total = torch.cuda.mem_get_info()
    pynvml.nvmlInit()
    running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return total - free - sum(each.usedGpuMemory or 0 for each in running if each.pid != os.getpid())


if __name__ == "__main__":
    main()
