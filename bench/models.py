"""Models of published shapes with random 4-bit weights, built on the GPU in seconds: speed and memory don't depend on
the weights' values.

One layer's random weights are quantized, the other layers get copies of the packed tensors: 70B in NF4 is there at once
and was never there in 16 bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers import AutoHfQuantizer

CONFIGS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "phi3": Phi3Config, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
}  # fmt: skip


FUSED = {
    "phi3": {
        "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
        "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    }
}  # fmt: skip
"""Of families in which several linear layers are one: its name, by theirs."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a config.json says of a model's size."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    rope_theta: float = 10_000.0
    head_size: int = 0
    """0: hidden / heads, which no config.json says."""
    rotated: float = 1.0
    """Share of each head that the rotary embedding turns, where the family leaves that open."""

    def config(self, max_length: int) -> Any:
        """transformers' config."""
        return CONFIGS[self.family](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max(8192, max_length),
            rope_parameters=self._rope,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            **({"head_dim": self.head_size} if self.head_size else {}),
        )

    @property
    def as_llama(self) -> Shape:
        """A Llama of the same numbers."""
        return replace(self, family="llama")

    def named(self, linears: Iterable[str]) -> list[str]:
        """The family's own names of linear layers that are called as in Llama."""
        own = FUSED.get(self.family, {})
        return list(dict.fromkeys(own.get(name, name) for name in linears))

    @property
    def _rope(self) -> dict[str, Any]:
        share = {"partial_rotary_factor": self.rotated} if self.rotated < 1 else {}
        return {"rope_type": "default", "rope_theta": self.rope_theta, **share}

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all but the embeddings."""
        head = self.head_size or self.hidden // self.heads
        attention = self.hidden * head * 2 * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary


SHAPES = {
    "llama-2-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32_000),
    "llama-2-13b": Shape("llama", 5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": Shape("llama", 8192, 28672, 80, 64, 8, 32_000),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128_256, 500_000.0),
    "qwen2-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152_064, 1_000_000.0),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 151_936, 1_000_000.0, head_size=128),
    "phi-4": Shape("phi3", 5120, 17920, 40, 40, 10, 100_352, 250_000.0),
    "tinyllama-1b": Shape("llama", 2048, 5632, 22, 32, 4, 32_000),
    "tiny": Shape("llama", 256, 512, 2, 4, 2, 1024),
    "tiny-qwen2": Shape("qwen2", 256, 512, 2, 4, 2, 1024),
    "tiny-qwen3": Shape("qwen3", 256, 512, 2, 4, 2, 1024, head_size=128),
    "tiny-phi3": Shape("phi3", 256, 512, 2, 4, 2, 1024),
}


def build(
    shape: Any,
    *,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    max_length: int = 8192,
    quant_type: str = "nf4",
) -> Any:
    """The model as `from_pretrained` with a BitsAndBytesConfig would leave it. Embeddings, norms and head in `dtype`.

    `shape` is a Shape, or transformers' config of any decoder whose layers are alike.
    """
    config = shape.config(max_length) if isinstance(shape, Shape) else shape
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    layers = decoder_layers(model)
    linears = {name: module for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)}
    packed = {name: _quantized(module, quantization, dtype, device) for name, module in linears.items()}
    for layer in layers:
        for name, module in linears.items():
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, _linear(module, *packed[name], quantization, device))
    for module in model.modules():
        _materialise(module, dtype, device)
    model.tie_weights()
    with torch.device(device):  # rotary frequencies are computed, not loaded
        for name, module in list(model.named_modules()):
            if "rotary" in type(module).__name__.lower():
                model.set_submodule(name, type(module)(config=config))  # by name: Unsloth's takes others before it
    model.config.quantization_config = quantization
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = quantization.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    return model


def decoder_layers(model: Any) -> list[Any]:
    """The model's decoder layers, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _quantized(linear: nn.Linear, spec: BitsAndBytesConfig, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype, device=device) * 0.02
    return bitsandbytes.functional.quantize_4bit(  # type: ignore[no-any-return]
        weight, compress_statistics=spec.bnb_4bit_use_double_quant, quant_type=spec.bnb_4bit_quant_type
    )


def _linear(like: nn.Linear, packed: torch.Tensor, state: Any, spec: BitsAndBytesConfig, device: str) -> Any:
    own = copy.copy(state)
    own.absmax = state.absmax.clone()
    if state.nested:
        own.state2 = copy.copy(state.state2)
        own.state2.absmax = state.state2.absmax.clone()
    module = bitsandbytes.nn.Linear4bit(
        like.in_features,
        like.out_features,
        bias=like.bias is not None,
        compute_dtype=spec.bnb_4bit_compute_dtype,
        compress_statistics=spec.bnb_4bit_use_double_quant,
        quant_type=spec.bnb_4bit_quant_type,
        device="meta",
    )
    module.weight = bitsandbytes.nn.Params4bit(
        packed.clone(),
        requires_grad=False,
        quant_state=own,
        compress_statistics=spec.bnb_4bit_use_double_quant,
        quant_type=spec.bnb_4bit_quant_type,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = own
    module.support_avx512bf16_for_cpu = False
    return module


def _materialise(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Norms are 1, biases and the rest are small random numbers."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            norm = "norm" in type(module).__name__.lower()
            data = torch.empty(parameter.shape, dtype=dtype, device=device)
            data = data.fill_(1) if norm else data.normal_(std=0.02)
            setattr(module, name, nn.Parameter(data, requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_meta:
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
