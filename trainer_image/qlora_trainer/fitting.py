"""The plan held against the GPU that is really there, before anything is loaded onto it.

A plan knows a class of GPUs. The one at hand may have less to give: others may be at work on it, or its label said too
much. Then the run goes down the operator's own ladder on the spot, instead of running out of memory on the way.
"""

from __future__ import annotations

import torch

from qlora_trainer.hardware import Hardware
from qlora_vram import words
from qlora_vram.calibration import shipped
from qlora_vram.gpus import MIB, GpuClass
from qlora_vram.outcome import DoesNotFit
from qlora_vram.replan import replan
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec


def fitted(plan: Plan, spec: QLoRAJobSpec, facts: ModelFacts, hardware: Hardware) -> Plan:
    """The plan, or one with the same result that fits into what this GPU has left; that is noted as a degradation."""
    if not hardware.on_gpu:
        return plan
    left = memory_left()
    smaller = shrunk(plan, spec, facts, left)
    if smaller is not plan:
        planned = words.gigabytes(plan.predicted_peak_bytes)
        hardware.degrade(
            f"this GPU has {words.gigabytes(left)} left, and the plan takes {planned}: "
            f"trains with a micro batch of {smaller.micro_batch_size}, checkpointing {smaller.checkpointing}"
            f"{' in host memory' if smaller.offload_checkpoints else ''}"
        )
    return smaller


def memory_left() -> int:
    """Bytes of the GPU that this process, which has just started CUDA, can have in all."""
    free, _ = torch.cuda.mem_get_info()
    return free + shipped().context_bytes


def shrunk(plan: Plan, spec: QLoRAJobSpec, facts: ModelFacts, left: int) -> Plan:
    """The first rung down from `plan` that takes at most `left` bytes; `plan` itself where it does, or none does.

    What takes more is tried all the same: CUDA has the last word, and the operator knows larger classes.
    """
    here = GpuClass(
        name=plan.gpu_class, memory_mib=max(1024, left // MIB), compute_capability=8.0 if plan.bf16 else 7.5
    )
    found = plan
    while found.predicted_peak_bytes > left:
        rung = replan(found, spec, facts, (here,))
        if isinstance(rung, DoesNotFit):
            return plan
        found = rung.model_copy(update={"requests": plan.requests})
    return found
