"""After a run was out of GPU memory: the next plan for it, with the same result and less memory. Pure.

A ladder, one rung at a time: no cache of weights in 16 bit, half the micro batch (at twice the accumulation), then
checkpointing of every layer, then checkpoints in host memory, then the next bigger class. What the user fixed stays.
Each rung predicts strictly less memory than the one before or stands on a class that holds strictly more, so that the
ladder ends and repeats nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_vram import words
from qlora_vram.calibration import Calibration
from qlora_vram.cuts import Cutter, Option, options
from qlora_vram.gpus import CPU, SHIPPED, GpuClass, usable_bytes
from qlora_vram.layers import detailed
from qlora_vram.observations import Observations
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import as_plan
from qlora_vram.requests import Defaults, Settings
from qlora_vram.workload import Workload
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec


def replan(
    plan: Plan,
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass] = SHIPPED,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    observations: Observations | None = None,
) -> Plan | DoesNotFit:
    """The plan to go on with after `plan` was out of GPU memory, at the same global batch; or that there is none."""
    facts = detailed(facts)
    here = next((gpu for gpu in classes if gpu.name == plan.gpu_class), None)
    if plan.gpu_class == CPU or here is None:
        return _at_the_end(plan)
    option = Option(here, plan.gpus, plan.strategy)
    cutter = Cutter(spec, facts, option, calibration, observations)
    current = cutter.planned(plan)
    for what, cut in _smaller(cutter, current):
        # As modelled: a measurement that bounds both says nothing about which takes less.
        if cutter.modelled(cut).total < cutter.modelled(current).total:
            return as_plan(spec, cut, option, cutter, settings or Defaults(), reason=_why(plan, what, cut, cutter))
    for bigger in options(spec, classes):
        # Smaller than here: out of memory there too. Not one that holds more only on paper: the prediction was wrong.
        if usable_bytes(bigger.gpu) > usable_bytes(here) and bigger.gpus == plan.gpus:
            cutter = Cutter(spec, facts, bigger, calibration, observations)
            cut = cutter.cut(current.shape)
            if cutter.fits(cut):
                what = f"the bigger class {bigger.gpu.name}"
                return as_plan(spec, cut, bigger, cutter, settings or Defaults(), reason=_why(plan, what, cut, cutter))
    return _at_the_end(plan)


def _smaller(cutter: Cutter, cut: Workload) -> Iterator[tuple[str, Workload]]:
    """The rungs on the same class, by what they change."""
    shape = cut.shape
    if shape.cached:
        cut = cutter.recut(cut, cached=False)
        yield "all weights in 4 bit only", cut
    fewer = [rows for rows in cutter.rows() if rows <= shape.rows // 2]
    if fewer:
        yield f"a micro batch of {max(fewer)}", cutter.recut(cut, rows=max(fewer))
    most = max(cutter.checkpointed())
    if shape.checkpointed_layers < most:
        yield "checkpointing of every layer", cutter.recut(cut, checkpointed_layers=most)
    if cutter.may_offload and not shape.offload:
        yield "checkpoints in host memory", cutter.recut(cut, checkpointed_layers=most, offload=True)


def _why(plan: Plan, what: str, cut: Workload, cutter: Cutter) -> str:
    return (
        f"Out of GPU memory on {plan.gpu_class} with {words.rows(plan.micro_batch_size, cut.length)}: goes on with "
        f"{what}, which takes about {words.gigabytes(cutter.predicted(cut))}"
    )


def _at_the_end(plan: Plan) -> DoesNotFit:
    message = (
        f"out of GPU memory on {plan.gpu_class} with micro batch {plan.micro_batch_size} and checkpointing "
        f"{plan.checkpointing}, and nothing that the spec allows takes less: lower training.maxSequenceLength or "
        "lora.rank, or leave resources.gpuClass, training.microBatchSize and training.gradientCheckpointing at auto"
    )
    return DoesNotFit(Reason.OUT_OF_MEMORY, message, "resources.gpuClass")
