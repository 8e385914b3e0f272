"""Measures peaks, each in a process of its own: `python -m bench.vram.worker [POINTS.json]`. Needs a GPU.

Each process is forked after the imports and before the first use of the GPU, so that it has a CUDA context of its own
and starts in a moment. Results are lines of JSON.
"""

# ruff: noqa: E402 - imports are what this is about
from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # `torch.cuda.is_available` without CUDA
sys.modules["torchao"] = None  # type: ignore[assignment] # Unsloth's, found by transformers; asks the GPU's properties

import torch


def _capability(*_: Any) -> tuple[int, int]:
    """The GPU's compute capability without CUDA."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    major, _dot, minor = subprocess.check_output(command, text=True).splitlines()[0].partition(".")
    return int(major), int(minor)


def _refuse() -> None:
    raise RuntimeError("this import uses the GPU: processes forked from here couldn't")


_asked_cuda, _start_cuda = torch.cuda.get_device_capability, torch.cuda._lazy_init
torch.cuda._lazy_init = _refuse
torch.cuda.get_device_capability = _capability  # type: ignore[assignment] # bitsandbytes asks when it is imported

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig

from bench.inputs import rows, tokenizer, training_data
from bench.jobs import plan_of
from bench.models import build
from bench.vram.points import CODE, HELD_OUT, POINTS, Point, outdated
from qlora_trainer import training
from qlora_trainer.data import TrainingData
from qlora_trainer.hardware import Hardware, peak_memory
from qlora_trainer.model import add_adapter

torch.cuda.get_device_capability, torch.cuda._lazy_init = _asked_cuda, _start_cuda

STEPS = 3
"""The first step makes the optimizer's states, the second meets them; and small micro batches become a CUDA graph."""
LIMIT = 120.0
"""Seconds for one point."""


def main() -> None:
    """Measure the points of a file, or of this project's list."""
    # What hasn't been measured yet comes first, should the time run out; then what the trainer has outgrown.
    points = (*HELD_OUT, *sorted(POINTS, key=lambda point: not outdated(point.workload(), CODE - 1)))
    if len(sys.argv) > 1:
        points = tuple(Point.from_json(found) for found in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    for point in points:
        print(json.dumps({"point": point.to_json(), "code": CODE, **_in_a_process(point)}), flush=True)


def _in_a_process(point: Point) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(point, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(LIMIT) else {"error": f"longer than {LIMIT:.0f} s"}
    except EOFError:
        found = {"error": "the process died"}
    process.kill()
    process.join()
    return found


def _measure(point: Point, sender: Any) -> None:
    try:
        sender.send(measure(point))
    except Exception as error:
        sender.send({"error": f"{type(error).__name__}: {error}"[:500]})


def measure(point: Point) -> dict[str, Any]:
    """Train a few steps the trainer's way, with random weights of the model's shape. Sizes are in bytes."""
    began = time.monotonic()
    spec, facts = point.spec(STEPS), point.facts
    layers = min(point.checkpointed, facts.layers)
    plan = plan_of(
        spec,
        rows=point.rows,
        checkpointing="none" if not layers else "full" if layers == facts.layers else "partial",
        checkpointed_layers=layers,
        offload_checkpoints=point.offload,
        cache_weights=point.cached,
    )
    hardware = Hardware.choose(spec, plan)  # first of all: it says how CUDA's memory is managed
    torch.cuda.init()  # type: ignore[no-untyped-call]
    free, total = torch.cuda.mem_get_info()
    context = total - free
    model = add_adapter(build(_config(point), double_quant=point.double_quant), spec.lora)
    loaded = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()  # what building left behind, which loading doesn't
    torch.cuda.reset_peak_memory_stats()
    trainer = training.make_trainer(
        spec,
        plan,
        hardware,
        model=model,
        tokenizer=tokenizer(),
        data=_data(point),
        total_steps=STEPS,
        folder=Path(tempfile.mkdtemp()),
        callbacks=[],
    )
    training.train(trainer, 0, None)
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "driver": peak_memory(hardware),
        "context": context,
        "loaded": loaded,
        "engine": "fast" if trainer.fast is not None else "plain",
        "degradations": hardware.degradations,
        "seconds": round(time.monotonic() - began, 1),
        "gpu": torch.cuda.get_device_name(),
    }


def _config(point: Point) -> Any:
    """transformers' config, with room for the point's length and special tokens that exist."""
    found = point.config
    kind = found.pop("model_type")
    found.pop("architectures", None)
    longest = max(point.length, int(found.get("max_position_embeddings", 0)), 4096)
    return AutoConfig.for_model(kind, **{**found, "max_position_embeddings": longest})


def _data(point: Point) -> TrainingData:
    """Rows that fill every micro batch; packed, each is two documents."""
    count = point.rows * point.accumulation * STEPS
    lengths = [point.length // 2] * (2 * count) if point.packing else [point.length] * count
    return training_data(rows(lengths, point.facts.vocabulary), capacity=point.length if point.packing else None)


if __name__ == "__main__":
    main()
