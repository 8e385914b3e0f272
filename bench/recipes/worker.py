"""One recipe in a process of its own: `python -m bench.recipes.worker RECIPE [OPTIONS]`.

The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench.inputs import rows, tokenizer, training_data
from bench.jobs import plan_of
from bench.models import build
from bench.recipes.cases import RECIPES, TINY, Recipe
from bench.recipes.predictions import plan_on_gpu
from bench.train.clock import StepClock
from bench.train.profile import components
from qlora_trainer import training
from qlora_trainer.hardware import Hardware, peak_memory
from qlora_trainer.model import add_adapter
from qlorajob.plan import Plan
from qlorajob.spec import QLoRAJobSpec


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--full", action="store_true", help="every row as long as maxSequenceLength")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on a CPU too")
    parser.add_argument("--profile", action="store_true", help="a micro batch by component too")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    print(json.dumps(measure(recipe, options.steps, full=options.full, tiny=options.tiny, profiled=options.profile)))


def measure(recipe: Recipe, steps: int, *, full: bool, tiny: bool, profiled: bool = False) -> dict[str, Any]:
    """Train with random weights of the recipe's shape. Sizes are in bytes; the step is the median after the first."""
    began = time.monotonic()
    spec = recipe.spec(steps)
    shape = {**recipe.shape(), **(TINY if tiny else {})}
    plan = _plan(spec, shape)
    hardware = Hardware.choose(spec, plan)  # first of all: it says how CUDA's memory is managed
    model = build(
        _config(shape, spec.training.max_sequence_length),
        double_quant=spec.quantization.double_quant,
        dtype=hardware.compute_dtype,
        device=hardware.device,
    )
    model = add_adapter(model, spec.lora)
    if hardware.on_gpu:
        torch.cuda.empty_cache()  # what building left behind, which loading doesn't
        torch.cuda.reset_peak_memory_stats()
    lengths = recipe.lengths(spec.training.global_batch_size * steps, spec.training.max_sequence_length, full=full)
    clock = StepClock(1)
    trainer = training.make_trainer(
        spec,
        plan,
        hardware,
        model=model,
        tokenizer=tokenizer(),
        data=training_data(rows(lengths, model.config.vocab_size)),
        total_steps=steps,
        folder=Path(tempfile.mkdtemp()),
        callbacks=[clock],
    )
    training.train(trainer, spec.training.seed, None)
    seconds = clock.median()
    return {
        "recipe": recipe.name,
        "lengths": "full" if full else "recipe",
        "meanLength": round(sum(lengths) / len(lengths), 1),
        "steps": steps,
        "microBatch": plan.micro_batch_size,
        "accumulation": plan.gradient_accumulation,
        "checkpointed": plan.checkpointed_layers,
        "cached": plan.cache_weights,
        "length": spec.training.max_sequence_length,
        "computeType": str(hardware.compute_dtype).removeprefix("torch."),
        "precision": hardware.precision,
        "optimizer": hardware.optimizer,
        "path": "fast" if trainer.fast is not None else "plain",
        "degradations": hardware.degradations,
        "allocated": torch.cuda.max_memory_allocated() if hardware.on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if hardware.on_gpu else 0,
        "driver": peak_memory(hardware),
        "predicted": plan.predicted_peak_bytes,
        "stepSeconds": round(seconds, 4),
        "samplesPerSecond": round(spec.training.global_batch_size / seconds, 2),
        "tokensPerSecond": round(trainer.tokens_seen / steps / seconds, 1),
        "losses": [round(loss, 4) for loss in clock.losses],
        "seconds": round(time.monotonic() - began, 1),
        "gpu": torch.cuda.get_device_name() if hardware.on_gpu else "CPU",
        **({"profile": components(trainer)} if profiled else {}),
    }


def _plan(spec: QLoRAJobSpec, shape: dict[str, Any]) -> Plan:
    """The planner's, for an H100; on a machine without a GPU one for its CPU."""
    if not torch.cuda.is_available():
        rows_at_once = spec.training.micro_batch_size
        return plan_of(spec, rows=rows_at_once if isinstance(rows_at_once, int) else 1, gpus=0)
    return plan_on_gpu(spec, shape)[1]


def _config(shape: dict[str, Any], length: int) -> Any:
    """transformers' config, with room for the recipe's length."""
    found = {key: value for key, value in shape.items() if key not in ("model_type", "architectures")}
    longest = max(length, int(found.get("max_position_embeddings", 0)), 2048)
    return AutoConfig.for_model(shape["model_type"], **{**found, "max_position_embeddings": longest})


if __name__ == "__main__":
    main()
