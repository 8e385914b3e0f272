"""The plan held against the GPU that is really there, before anything is loaded onto it.

A plan knows a class of GPUs. The one at hand may have less to give: others may be at work on it, or its label said too
much. Then the run goes down the operator's own ladder on the spot, instead of running out of memory on the way.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qlora_trainer.hardware import Hardware
from qlora_trainer.settings import usable_memory
from qlora_vram import words
from qlora_vram.calibration import shipped
from qlora_vram.cuts import Cutter, Option
from qlora_vram.gpus import MIB, GpuClass
from qlora_vram.layers import detailed
from qlora_vram.memory import host_bytes
from qlora_vram.outcome import DoesNotFit
from qlora_vram.recognition import LEAST_MIB
from qlora_vram.replan import replan
from qlora_vram.workload import Workload
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec

POD = ("gpu_memory_mib", "requests")
"""What a plan says of its pod, which runs already."""


def fitted(plan: Plan, spec: QLoRAJobSpec, facts: ModelFacts, hardware: Hardware) -> Plan:
    """The plan, or one with the same result that fits into what this GPU has left; that is noted as a degradation."""
    if not hardware.on_gpu:
        return plan
    left = memory_left()
    smaller = shrunk(plan, spec, facts, left, usable_memory())
    if smaller is not plan:
        planned = words.gigabytes(plan.predicted_peak_bytes)
        hardware.degrade(
            f"this GPU has {words.gigabytes(left)} left, and the plan takes {planned}: "
            f"trains with a micro batch of {smaller.micro_batch_size}, checkpointing {smaller.checkpointing}"
            f"{' in host memory' if smaller.offload_checkpoints else ''}"
            f"{', all weights in 4 bit only' if plan.cache_weights and not smaller.cache_weights else ''}"
        )
    return smaller


def memory_left() -> int:
    """Bytes of the GPU that this process, which has just started CUDA, can have in all."""
    free, _ = torch.cuda.mem_get_info()
    return free + shipped().context_bytes


def shrunk(plan: Plan, spec: QLoRAJobSpec, facts: ModelFacts, left: int, host: int) -> Plan:
    """The first rung down from `plan` that fits into `left` bytes, with the margin of every plan; `plan` if it does.

    Where none fits, the last is tried all the same: CUDA has the last word, and the operator knows larger classes. But
    none whose checkpoints don't fit into the `host` memory that this pod was given.
    """
    here = GpuClass(
        name=plan.gpu_class, memory_mib=max(LEAST_MIB, left // MIB), compute_capability=8.0 if plan.bf16 else 7.5
    )
    cutter = Cutter(spec, detailed(facts), Option(here, plan.gpus, plan.strategy))
    # Beyond the memory model, since earlier runs took more. Smaller cuts will, too.
    unforeseen = max(0, plan.predicted_peak_bytes - cutter.modelled(cutter.planned(plan)).total)
    found, takes = plan, plan.predicted_peak_bytes
    while takes > cutter.usable:
        rung = replan(found, spec, facts, (here,))
        if isinstance(rung, DoesNotFit) or (rung.offload_checkpoints and _parked(cutter.planned(rung)) > host):
            break
        found = rung.model_copy(update={name: getattr(plan, name) for name in POD})
        takes = found.predicted_peak_bytes + unforeseen
    return found


def _parked(cut: Workload) -> int:
    """Host memory of a run, without its weight files: the kernel gives those up where something else needs room."""
    return host_bytes(replace(cut, facts=cut.facts.model_copy(update={"weight_bytes": 0})))
