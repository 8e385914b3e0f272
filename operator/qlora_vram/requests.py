"""What the pods ask for beside GPUs: CPU, memory, local disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qlora_vram.gpus import GIB
from qlora_vram.memory import disk_bytes, host_bytes
from qlora_vram.words import quantity
from qlora_vram.workload import Workload
from qlorajob.plan import ModelFacts, Requests
from qlorajob.spec import QLoRAJobSpec

LOADED_BYTES = 2 * GIB
"""Python with torch and transformers, and room to breathe."""

MERGING_BYTES_PER_WEIGHT = 8
"""Of the tensor that is merged: the update in float32, the weight beside it, and their sum in 16 bit."""


class Settings(Protocol):
    """What an administrator decides. The operator's configuration is one."""

    @property
    def gpu_cpu_request(self) -> str:
        """CPU request of a pod with a GPU."""

    @property
    def cpu_cpu_request(self) -> str:
        """CPU request of a pod without one."""

    @property
    def cpu_memory_budget_bytes(self) -> int:
        """Memory that training without a GPU should stay below."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings where nobody decided anything."""

    gpu_cpu_request: str = "1"
    cpu_cpu_request: str = "1"
    cpu_memory_budget_bytes: int = 8 * GIB


def gpu_requests(spec: QLoRAJobSpec, cut: Workload, settings: Settings) -> Requests:
    """Requests of a training pod with a GPU. What the user asked for stays."""
    downloads = spec.model.cache_claim is None
    return Requests(
        cpu=asked(spec.resources.cpu, settings.gpu_cpu_request),
        memory=asked(spec.resources.memory, quantity(host_bytes(cut))),
        ephemeral_storage=asked(spec.resources.ephemeral_storage, quantity(disk_bytes(cut, downloads=downloads))),
    )


def merge_requests(spec: QLoRAJobSpec, facts: ModelFacts, settings: Settings) -> Requests:
    """What merging takes: in memory the largest tensor, or the whole merged model where it is to answer prompts.

    On disk it is the base, the merged model (of which an upload may need a copy), and what the GGUF export adds.
    """
    bytes_per_parameter = 4 if spec.merge.dtype == "float32" else 2
    merged = facts.parameters * bytes_per_parameter
    exports = 3 if spec.merge.gguf else 2
    streamed = MERGING_BYTES_PER_WEIGHT * _largest_tensor(facts)
    answering = merged + merged // 8 if spec.evaluation.prompts else 0
    processes = 2 if spec.merge.gguf else 1  # the export's converter is one of its own
    return Requests(
        cpu=settings.cpu_cpu_request,
        memory=quantity(processes * LOADED_BYTES + max(streamed, answering)),
        ephemeral_storage=quantity(2 * GIB + facts.weight_bytes + exports * merged),
    )


def _largest_tensor(facts: ModelFacts) -> int:
    """Weights of the largest tensor in the model's files."""
    linears = (linear.inputs * linear.outputs for linear in facts.linears)
    experts = facts.expert_parameters // max(facts.layers, 1)
    return max(*linears, facts.embedding_parameters, facts.head_parameters, experts, 0)


def asked(value: str, automatic: str) -> str:
    """What the user wants, or what follows."""
    return automatic if value == "auto" else value
