"""What the pods ask for beside GPUs: CPU, memory, local disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qlora_vram.gpus import GIB
from qlora_vram.memory import disk_bytes, host_bytes
from qlora_vram.optimizers import ADAPTER
from qlora_vram.words import quantity
from qlora_vram.workload import Workload
from qlorajob.plan import ModelFacts, Requests
from qlorajob.spec import QLoRAJobSpec

LOADED_BYTES = 2 * GIB
"""Python with torch and transformers, and room to breathe."""
MERGED_TENSOR = 14
"""Bytes for each number of a tensor while it is merged: as read (up to 4), the update and its factors' product in
float32 (4 + 4), rounded (2)."""
SHARD_BYTES = 5_000_000_000
"""Largest file of a merged model (`qlora_trainer.checkpoint_files`)."""
GGUF_BYTES = {"f16": 2.0, "q8_0": 2 + 34 / 32, "q4_k_m": 2 + 210 / 256}
"""Bytes for each parameter: in 16 bit, and quantized (34 bytes for 32 of them; q4_k_m at most as Q6_K, 210 for 256)."""


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
    """What merging takes. It goes tensor by tensor and file by file, so hardly any of it follows from the model's size.

    Memory: the largest tensor (read, added up in float32, rounded) and the adapter; the whole merged model only where
    it is to answer evaluation.prompts. Disk: the download, unless a shared volume holds it, and one file of the merged
    model, or all of it where it answers or is exported. A GGUF export is a process of its own, which writes the whole
    model in 16 bit and the quantized one beside.
    """
    adapter = ADAPTER * spec.lora.rank * sum((each.inputs + each.outputs) * each.count for each in facts.linears)
    largest = _largest_tensor(facts)
    bytes_per_parameter = 4 if spec.merge.dtype == "float32" else 2
    merged = bytes_per_parameter * facts.parameters
    answering = merged + merged // 8 if spec.evaluation.prompts else 0
    processes = 2 if spec.merge.gguf else 1
    file = min(merged, max(SHARD_BYTES, bytes_per_parameter * largest))
    kept = merged if spec.evaluation.prompts or spec.merge.gguf else file
    download = 0 if spec.model.cache_claim else 5 * (facts.weight_bytes or 2 * facts.parameters) // 4
    export = int(GGUF_BYTES[spec.merge.gguf.quantization] * facts.parameters) if spec.merge.gguf else 0
    return Requests(
        cpu=settings.cpu_cpu_request,
        memory=quantity(processes * LOADED_BYTES + max(MERGED_TENSOR * largest + 2 * adapter, answering)),
        ephemeral_storage=quantity(2 * GIB + download + kept + export + 2 * adapter),
    )


def _largest_tensor(facts: ModelFacts) -> int:
    """Parameters of the largest one that a file may hold, at most: experts may be one tensor a layer."""
    experts = facts.expert_parameters // max(1, facts.layers)
    matrices = (each.inputs * each.outputs for each in facts.linears)
    return max(facts.embedding_parameters, facts.head_parameters, experts, *matrices, 0)


def asked(value: str, automatic: str) -> str:
    """What the user wants, or what follows."""
    return automatic if value == "auto" else value
