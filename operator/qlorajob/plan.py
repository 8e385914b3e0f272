"""The VRAM plan: which GPU, how many rows at once, and why. And the model facts that it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from qlorajob.base import ContractModel


class LinearLayers(ContractModel):
    """Linear layers of one name and shape: bitsandbytes quantizes them, and LoRA can adapt them."""

    name: Annotated[str, Field(max_length=64)]
    """Last part of the module's name, such as q_proj."""
    inputs: Annotated[int, Field(ge=1)]
    """in_features."""
    outputs: Annotated[int, Field(ge=1)]
    """out_features."""
    count: Annotated[int, Field(ge=1)]
    """How many there are in the whole model."""

    @property
    def parameters(self) -> int:
        """Weights of all of them, without biases."""
        return self.inputs * self.outputs * self.count


class ModelFacts(ContractModel):
    """What the planner needs to know of a model; follows from its config.json, without loading weights."""

    model_type: Annotated[str, Field(max_length=64)]
    """transformers' model type, such as llama."""
    parameters: Annotated[int, Field(ge=0)]
    """Parameters of the base model, shared ones once: the sum of the kinds below."""
    linears: tuple[LinearLayers, ...] = ()
    """The decoder's linear layers, without the output head."""
    embedding_parameters: Annotated[int, Field(ge=0)] = 0
    """Token and position embeddings."""
    head_parameters: Annotated[int, Field(ge=0)] = 0
    """The output head's own weights; 0 where it shares the embeddings'."""
    expert_parameters: Annotated[int, Field(ge=0)] = 0
    """Experts that transformers holds as stacked tensors: bitsandbytes leaves those in 16 bit."""
    other_parameters: Annotated[int, Field(ge=0)] = 0
    """Norms, biases, routers and whatever else is neither of the above."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Decoder layers."""
    hidden_size: Annotated[int, Field(ge=0)] = 0
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width inside the feed-forward part (of all the experts that one token visits)."""
    attention_heads: Annotated[int, Field(ge=0)] = 0
    """Query heads."""
    key_value_heads: Annotated[int, Field(ge=0)] = 0
    """Key and value heads."""
    head_size: Annotated[int, Field(ge=0)] = 0
    """Width of one head."""
    vocabulary: Annotated[int, Field(ge=0)] = 0
    """Rows of the output head."""
    regular_length: Annotated[int, Field(ge=0)] | None = None
    """Rows of at most so many tokens may take the trainer's fast path, in the families that it covers: longer ones meet
    a sliding window, or another rotary embedding. Null: rows of any length; 0: none, for what else the layers do."""
    whole_logits: bool = False
    """The loss is made from all of a micro batch's logits at once: the model's code doesn't let body and head apart."""
    weight_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of the weight files, that is of the download."""

    @property
    def quantized_parameters(self) -> int:
        """Weights that training holds in 4 bit."""
        return sum(linear.parameters for linear in self.linears)


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
    checkpointing: Literal["none", "partial", "full"]
    """Gradient checkpointing: of no layer, of the first `checkpointedLayers`, or of every one."""
    checkpointed_layers: Annotated[int, Field(ge=0)] = 0
    """How many layers, from the first, compute their forward pass again instead of keeping its results."""
    offload_checkpoints: bool = False
    """Checkpoints wait in host memory."""
    cache_weights: bool = False
    """The quantized weights are there in 16 bit too, so that no step dequantizes them."""
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    """How several GPUs share the work: none do, each holds the whole model, or each holds a part."""
    predicted_tokens_per_second: Annotated[float, Field(ge=0)] = 0
    """Predicted training speed, padding counted; 0 where there is no prediction."""
    bf16: bool = True
    """The GPU has bfloat16 (compute capability 8 or more)."""
    requests: Requests
    """What the container asks for."""
    reason: str
    """One sentence: why this plan."""
