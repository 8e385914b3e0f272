"""The VRAM plan: which GPU, how many rows at once, and why. And the model facts that it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from qlorajob.base import ContractModel


class ModelFacts(ContractModel):
    """What the planner needs to know of a model; read by `prepare` from its config, without loading weights."""

    model_type: Annotated[str, Field(max_length=64)]
    """transformers' model type, such as llama."""
    parameters: Annotated[int, Field(ge=0)]
    """Parameters of the base model."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Decoder layers."""
    hidden_size: Annotated[int, Field(ge=0)] = 0
    """Width of the residual stream."""
    vocabulary: Annotated[int, Field(ge=0)] = 0
    """Rows of the output head."""
    weight_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of the weight files, that is of the download."""


class Requests(ContractModel):
    """Kubernetes quantities that the training container asks for."""

    cpu: str
    """CPU request."""
    memory: str
    """Memory request and limit."""
    ephemeral_storage: str
    """Local disk request and limit."""


class Plan(ContractModel):
    """How a run uses the hardware. Changing it doesn't change the result (the global batch stays the same)."""

    gpu_class: str
    """Name of the GPU class, or cpu."""
    gpus: Annotated[int, Field(ge=0)]
    """GPUs of the training pod."""
    gpu_memory_mib: Annotated[int, Field(ge=0)] = 0
    """Memory that a node's GPU must have, in MiB, as `nvidia.com/gpu.memory` counts it; 0 on CPU."""
    predicted_peak_bytes: Annotated[int, Field(ge=0)]
    """Predicted peak of memory used on each GPU (host memory on CPU)."""
    breakdown: Mapping[str, int] = Field(default={})
    """Components of the prediction, in bytes."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Rows that go through one GPU at once."""
    gradient_accumulation: Annotated[int, Field(ge=1)]
    """Micro batches that make one optimizer step."""
    checkpointing: Literal["none", "full"]
    """Gradient checkpointing: none or every layer."""
    bf16: bool = True
    """The GPU has bfloat16 (compute capability 8 or more)."""
    requests: Requests
    """What the container asks for."""
    reason: str
    """One sentence: why this plan."""
