"""Families with a projection each for query, key and value, as Llama has them: most of what is published today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_vram.architectures.layout import Condition, Family, Linear, Norm

QV = ("q_proj", "v_proj")


def attention(qkv_bias: Condition = False, out_bias: Condition = False, output: str = "o_proj") -> tuple[Linear, ...]:
    """Four projections, with grouped or single key and value heads."""
    return (
        Linear("self_attn.q_proj", "hidden", "queries", qkv_bias),
        Linear("self_attn.k_proj", "hidden", "keys", qkv_bias),
        Linear("self_attn.v_proj", "hidden", "keys", qkv_bias),
        Linear(f"self_attn.{output}", "queries", "hidden", out_bias),
    )


def gated(bias: Condition = False, width: str = "ffn", path: str = "mlp") -> tuple[Linear, ...]:
    """Gate, up and down."""
    return (
        Linear(f"{path}.gate_proj", "hidden", width, bias),
        Linear(f"{path}.up_proj", "hidden", width, bias),
        Linear(f"{path}.down_proj", width, "hidden", bias),
    )


def plain(first: str, second: str, bias: Condition = False) -> tuple[Linear, ...]:
    """Up and down, without a gate."""
    return Linear(first, "hidden", "ffn", bias), Linear(second, "ffn", "hidden", bias)


def sizes(
    vocabulary: int, hidden: int, ffn: int | None, layers: int, heads: int, kv_heads: int | None = None, **others: Any
) -> dict[str, Any]:
    """Defaults under transformers' names. None follows from the rest."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **others,
    }


GATED_GLM = (Linear("mlp.gate_up_proj", "hidden", "ffn+ffn"), Linear("mlp.down_proj", "ffn", "hidden"))
LAYER_NORM = Norm("hidden", bias=True)
RMS_NORM = Norm("hidden")
HEAD_NORMS = (Norm("head"), Norm("head"))
"""Of queries and keys, shared by the heads."""

LLAMA = Family(
    defaults=sizes(32000, 4096, 11008, 32, 32),
    aliases={},
    attention=attention("attention_bias", "attention_bias"),
    feed_forward=gated("mlp_bias"),
    norms=(RMS_NORM, RMS_NORM),
    outer_norms=(RMS_NORM,),
    lora_default=QV,
)
MISTRAL = replace(LLAMA, defaults=sizes(32000, 4096, 14336, 32, 32, 8), attention=attention(), feed_forward=gated())
QWEN2 = replace(MISTRAL, defaults=sizes(151936, 4096, 22016, 32, 32, 32), attention=attention(qkv_bias=True))
QWEN3 = replace(
    LLAMA,
    defaults=sizes(151936, 4096, 22016, 32, 32, 32, head_dim=128),
    feed_forward=gated(),
    norms=(*HEAD_NORMS, RMS_NORM, RMS_NORM),
)
GEMMA = replace(
    LLAMA,
    defaults=sizes(256000, 3072, 24576, 28, 16, 16, head_dim=256, tie_word_embeddings=True),
    feed_forward=gated(),
)
GEMMA2 = replace(
    GEMMA,
    defaults=sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256, tie_word_embeddings=True),
    norms=(RMS_NORM,) * 4,
)
GEMMA3 = replace(GEMMA2, defaults={**GEMMA2.defaults, "vocab_size": 262208}, norms=(*HEAD_NORMS, *(RMS_NORM,) * 4))
GLM = replace(
    LLAMA,
    defaults=sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True),
    attention=attention("attention_bias"),
    feed_forward=GATED_GLM,
    lora_default=(),
)
OLMO = replace(
    LLAMA,
    defaults=sizes(50304, 4096, 11008, 32, 32),
    feed_forward=gated(),
    norms=(),  # its norms have no parameters
    outer_norms=(),
    lora_default=(),
)
OLMO2 = replace(OLMO, norms=(Norm("queries"), Norm("keys"), RMS_NORM, RMS_NORM), outer_norms=(RMS_NORM,))
COHERE = replace(
    LLAMA,
    defaults=sizes(256000, 8192, 22528, 40, 64, tie_word_embeddings=True, use_qk_norm=False),
    feed_forward=gated(),
    norms=(Norm("queries", when="use_qk_norm"), Norm("keys", when="use_qk_norm"), RMS_NORM),
    lora_default=(),
)
STABLELM = replace(
    MISTRAL,
    defaults=sizes(50304, 2560, 6912, 32, 32, 32),
    attention=attention(qkv_bias="use_qkv_bias"),
    norms=(
        Norm("queries", when="qk_layernorm"),
        Norm("keys", when="qk_layernorm"),
        LAYER_NORM,
        Norm("hidden", bias=True, when="!use_parallel_residual"),
    ),
    outer_norms=(LAYER_NORM,),
)
PHI = Family(
    defaults=sizes(51200, 2048, 8192, 24, 32),
    aliases={},
    attention=attention(True, True, output="dense"),
    feed_forward=plain("mlp.fc1", "mlp.fc2", bias=True),
    norms=(
        Norm("head", bias=True, when="qk_layernorm"),
        Norm("head", bias=True, when="qk_layernorm"),
        LAYER_NORM,
    ),
    outer_norms=(LAYER_NORM,),
    head_bias=True,
    lora_default=("q_proj", "v_proj", "fc1", "fc2"),
)
PHI3 = replace(
    MISTRAL,
    defaults=sizes(32064, 3072, 8192, 32, 32),
    attention=(
        Linear("self_attn.o_proj", "queries", "hidden"),
        Linear("self_attn.qkv_proj", "hidden", "queries+keys+keys"),
    ),
    feed_forward=GATED_GLM,
    lora_default=(),
)
STARCODER2 = Family(
    defaults=sizes(49152, 3072, 12288, 30, 24, 2, use_bias=True, tie_word_embeddings=True),
    aliases={},
    attention=attention("use_bias", "use_bias"),
    feed_forward=plain("mlp.c_fc", "mlp.c_proj", bias="use_bias"),
    norms=(LAYER_NORM, LAYER_NORM),
    outer_norms=(LAYER_NORM,),
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": replace(MISTRAL, defaults=sizes(131072, 4096, 14336, 34, 32, 8, head_dim=128), lora_default=()),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "glm": GLM,
    "glm4": replace(GLM, norms=(RMS_NORM,) * 4),
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "cohere": COHERE,
    "cohere2": replace(COHERE, norms=(RMS_NORM,)),
    "granite": replace(LLAMA, lora_default=()),
    "smollm3": replace(
        LLAMA, defaults=sizes(128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True), lora_default=()
    ),
    "arcee": replace(
        LLAMA,
        defaults=sizes(32000, 2560, 18432, 32, 32),
        feed_forward=plain("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"),
        lora_default=(),
    ),
    "seed_oss": replace(
        LLAMA,
        defaults=sizes(155136, 4096, 27648, 64, 80, 8, head_dim=128, attention_bias=True),
        attention=attention("attention_bias", "attention_out_bias"),
        lora_default=(),
    ),
    "exaone4": replace(QWEN3, defaults=sizes(102400, 4096, 16384, 32, 32, 32), attention=attention(), lora_default=()),
    "ernie4_5": replace(
        LLAMA,
        defaults=sizes(103424, 1024, 3072, 18, 16, 2, head_dim=128, tie_word_embeddings=True),
        attention=attention("use_bias", "use_bias"),
        feed_forward=gated("use_bias"),
        lora_default=(),
    ),
    "stablelm": STABLELM,
    "phi": PHI,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
}
