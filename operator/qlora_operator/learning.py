"""From a run that has ended to what its successors' plans can use. Pure."""

from __future__ import annotations

from datetime import datetime

from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Fleet
from qlora_vram.cuts import Cutter, Option
from qlora_vram.gpus import KNOWN
from qlora_vram.layers import detailed
from qlora_vram.observations import Observation, exhausted, observe
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import QLoRAJobStatus


def first_attempt(
    spec: QLoRAJobSpec, status: QLoRAJobStatus, fleet: Fleet, config: OperatorConfig, finished_at: datetime | None
) -> Observation | None:
    """What the run took on its GPU.

    None where nothing was measured, and for later attempts: those go on from a checkpoint, with the peak that an
    earlier attempt had under another plan. None where the trainer found less memory than was planned with, and so ran
    another cut: then its prediction is another one. None with Unsloth too: its prediction is a bound, and by how much
    it is missed says nothing about other runs of the class.
    """
    if spec.training.backend == "unsloth":
        return None
    planned, prepared, memory, run = status.plan, status.prepared, status.memory, status.run
    if not (planned and planned.gpus and prepared and memory and memory.peak_bytes and run and finished_at):
        return None
    if memory.predicted_bytes not in (None, planned.predicted_peak_bytes):
        return None
    cutter = _cutter(spec, planned, prepared.facts, fleet)
    if cutter is None or run.attempt != 1:
        return None
    cut = cutter.planned(planned)
    return observe(
        cut,
        cutter.option.gpu,
        cutter.modelled(cut),
        trainer=config.trainer_image,
        peak_bytes=memory.peak_bytes,
        tokens_per_second=memory.tokens_per_second,
        at=finished_at,
    )


def out_of_memory(
    spec: QLoRAJobSpec, planned: Plan, facts: ModelFacts, fleet: Fleet, config: OperatorConfig, finished_at: datetime
) -> Observation | None:
    """That this plan's GPU couldn't hold the run. Of any attempt: wherever it went on from, it was its plan's cut."""
    cutter = _cutter(spec, planned, facts, fleet)
    if cutter is None:
        return None
    cut = cutter.planned(planned)
    return exhausted(cut, cutter.option.gpu, cutter.modelled(cut), trainer=config.trainer_image, at=finished_at)


def _cutter(spec: QLoRAJobSpec, planned: Plan, facts: ModelFacts, fleet: Fleet) -> Cutter | None:
    """For the planned GPUs, whose nodes may be gone by now."""
    gpu = next((gpu for gpu in (*fleet.classes(), *KNOWN) if gpu.name == planned.gpu_class), None)
    return Cutter(spec, detailed(facts), Option(gpu, planned.gpus, planned.strategy)) if gpu else None
