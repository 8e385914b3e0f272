"""From a finished run to what its successors' plans can use. Pure."""

from __future__ import annotations

from datetime import datetime

from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Fleet
from qlora_vram.cuts import Cutter, Option
from qlora_vram.gpus import KNOWN, GpuClass
from qlora_vram.layers import detailed
from qlora_vram.observations import Observation, observe
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import QLoRAJobStatus


def first_attempt(
    spec: QLoRAJobSpec, status: QLoRAJobStatus, fleet: Fleet, config: OperatorConfig, finished_at: datetime | None
) -> Observation | None:
    """What the run took on its GPU.

    None where nothing was measured, and for later attempts: those go on from a checkpoint, with the peak that an
    earlier attempt had under another plan.
    """
    planned, prepared, memory, run = status.plan, status.prepared, status.memory, status.run
    if not (planned and planned.gpus and prepared and memory and memory.peak_bytes and run and finished_at):
        return None
    gpu = _class(planned.gpu_class, fleet)
    if gpu is None or run.attempt != 1:
        return None
    cutter = Cutter(spec, detailed(prepared.facts), Option(gpu, planned.gpus, planned.strategy))
    cut = cutter.planned(planned)
    return observe(
        cut,
        gpu,
        cutter.modelled(cut),
        trainer=config.trainer_image,
        peak_bytes=memory.peak_bytes,
        tokens_per_second=memory.tokens_per_second,
        at=finished_at,
    )


def _class(name: str, fleet: Fleet) -> GpuClass | None:
    """Its nodes may be gone by now."""
    return next((gpu for gpu in (*fleet.classes(), *KNOWN) if gpu.name == name), None)
