"""What the memory model says of the measured recipes: for their own rows, and for those that a plan has to hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.recipes.cases import RECIPES
from qlora_vram.calibration import Calibration
from qlora_vram.facts import model_facts
from qlora_vram.gpus import SHIPPED
from qlora_vram.memory import peak
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlora_vram.workload import Shape, Workload, workload
from qlorajob.plan import ModelFacts, Plan
from qlorajob.precision import NumberTypes
from qlorajob.spec import QLoRAJobSpec

GPU = next(gpu for gpu in SHIPPED if gpu.name == "H100")


def plan_on_gpu(spec: QLoRAJobSpec, shape: dict[str, Any]) -> tuple[ModelFacts, Plan]:
    """The model's facts and the planner's plan for an H100. Raises LookupError where there is none."""
    facts = model_facts(shape)
    if facts is None:
        raise LookupError(f"{shape['model_type']}: no facts")
    found = plan(spec, facts, (GPU,))
    if isinstance(found, DoesNotFit):
        raise LookupError(found.message)
    return facts, found


def planned(result: dict[str, Any]) -> Workload:
    """The run as it was cut, its rows as long as maxSequenceLength."""
    recipe = RECIPES[result["recipe"]]
    spec = recipe.spec(result["steps"])
    facts, found = plan_on_gpu(spec, recipe.shape())
    layers = result.get("checkpointed", found.checkpointed_layers)
    cached = result.get("cached", False)  # unsaid by runs from before there was a cache of weights
    shape = Shape(result["microBatch"], layers, offload=found.offload_checkpoints, cached=cached)
    work = workload(spec, facts, GPU, shape, result["accumulation"])
    types = NumberTypes(result["computeType"], result["precision"])
    return replace(work, engine=result["path"], recast=types.differ, scaled=types.precision == "fp16")


def measured(result: dict[str, Any]) -> Workload:
    """The run with its own rows: the longest one makes the peak."""
    work = planned(result)
    if work.packing:
        return work
    rows = result["steps"] * result["microBatch"] * result["accumulation"]
    full = result["lengths"] == "full"
    lengths = RECIPES[result["recipe"]].lengths(rows, work.length, full=full)
    return replace(work, length=max(lengths), changing=not full)


def error(result: dict[str, Any], constants: Calibration | None = None) -> float:
    """Relative error of the prediction for a measured run; negative where it is too small."""
    return peak(measured(result), constants).total / int(result["driver"]) - 1
