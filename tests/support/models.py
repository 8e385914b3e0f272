"""Facts of published models, from the part of their config.json that decides about memory."""

from __future__ import annotations

from typing import Any

from qlora_vram.facts import model_facts
from qlorajob.plan import ModelFacts


def _config(kind: str, layers: int, hidden: int, inner: int, heads: int, kv: int, words: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
        "tie_word_embeddings": False,
    }


CONFIGS = {
    "TinyLlama-1.1B": _config("llama", 22, 2048, 5632, 32, 4, 32000),
    "Qwen2.5-3B": _config("qwen2", 36, 2048, 11008, 16, 2, 151936) | {"tie_word_embeddings": True},
    "Llama-2-7B": _config("llama", 32, 4096, 11008, 32, 32, 32000),
    "Mistral-7B": _config("mistral", 32, 4096, 14336, 32, 8, 32000),
    "Llama-3-8B": _config("llama", 32, 4096, 14336, 32, 8, 128256),
    "Llama-2-13B": _config("llama", 40, 5120, 13824, 40, 40, 32000),
    "Qwen2.5-32B": _config("qwen2", 64, 5120, 27648, 40, 8, 152064),
    "CodeLlama-34B": _config("llama", 48, 8192, 22016, 64, 8, 32000),
    "Llama-2-70B": _config("llama", 80, 8192, 28672, 64, 8, 32000),
    "Mixtral-8x7B": _config("mixtral", 32, 4096, 14336, 32, 8, 32000)
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2.5-72B": _config("qwen2", 80, 8192, 29568, 64, 8, 152064),
}


def facts(name: str) -> ModelFacts:
    """Of a published model; its weights are in 16 bit."""
    found = model_facts(CONFIGS[name])
    assert found, name
    return found.model_copy(update={"weight_bytes": 2 * found.parameters})
