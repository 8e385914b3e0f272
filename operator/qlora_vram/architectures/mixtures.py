"""Families with a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlora_vram.architectures.layout import Condition, Experts, Family, Linear, Norm, Values
from qlora_vram.architectures.split import HEAD_NORMS, MISTRAL, OLMO2, QWEN2, QWEN3, RMS_NORM, attention, gated, sizes


def routed(count: int, per_token: int | None, **others: int) -> dict[str, int | None]:
    """Defaults of the experts under transformers' usual names."""
    return {"num_experts": count, "num_experts_per_tok": per_token, **others}


def _shared_experts(bias: Condition = False) -> Experts:
    """Experts as DeepSeek has them: the first layers are dense, and some experts are visited by every token."""
    return Experts(
        dense_first="first_k_dense_replace",
        shared=gated(bias, width="shared", path="mlp.shared_experts"),
        shared_width="shared",
    )


def _shared_width(values: Values) -> Mapping[str, int]:
    return {"shared": values["moe_intermediate_size"] * values["n_shared_experts"]}


def _latent_attention(values: Values) -> Mapping[str, int]:
    """Widths of DeepSeek's attention, whose keys and values pass through a narrow projection."""
    heads, head = values["num_attention_heads"], values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    return {
        "head": head,
        "queries": heads * head,
        "values": heads * values["v_head_dim"],
        "keys_and_values": heads * (values["qk_nope_head_dim"] + values["v_head_dim"]),
        **_shared_width(values),
    }


STACKED = {"num_experts": "num_local_experts"}
DEEPSEEK3 = Family(
    defaults={
        **sizes(129280, 7168, 18432, 61, 128, 128, q_lora_rank=1536, kv_lora_rank=512),
        **routed(256, 8, moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=3),
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    aliases={"num_experts": "n_routed_experts"},
    attention=(
        Linear("self_attn.q_proj", "hidden", "queries", when="!q_lora_rank"),
        Linear("self_attn.q_a_proj", "hidden", "q_lora_rank", "attention_bias", when="q_lora_rank"),
        Linear("self_attn.q_b_proj", "q_lora_rank", "queries", when="q_lora_rank"),
        Linear("self_attn.kv_a_proj_with_mqa", "hidden", "kv_lora_rank+qk_rope_head_dim", "attention_bias"),
        Linear("self_attn.kv_b_proj", "kv_lora_rank", "keys_and_values"),
        Linear("self_attn.o_proj", "values", "hidden", "attention_bias"),
    ),
    feed_forward=gated(),
    experts=_shared_experts(),
    norms=(Norm("q_lora_rank", when="q_lora_rank"), Norm("kv_lora_rank"), RMS_NORM, RMS_NORM),
    outer_norms=(RMS_NORM,),
    complete=_latent_attention,
)
MIXTRAL = replace(
    MISTRAL,
    defaults=sizes(32000, 4096, 14336, 32, 32, 8) | routed(8, 2),
    aliases=STACKED,
    experts=Experts(width="ffn"),
)
QWEN3_MOE = replace(
    QWEN3,
    defaults=sizes(151936, 2048, 6144, 24, 32, 4) | routed(128, 8, moe_intermediate_size=768, decoder_sparse_step=1),
    aliases=STACKED,
    experts=Experts(step="decoder_sparse_step", dense="mlp_only_layers"),
    lora_default=(),
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": MIXTRAL,
    "granitemoe": replace(
        MIXTRAL,
        defaults=sizes(32000, 4096, 11008, 32, 32) | routed(8, 2),
        attention=attention("attention_bias", "attention_bias"),
        feed_forward=(),
        lora_default=(),
    ),
    "olmoe": replace(
        OLMO2,
        defaults=sizes(50304, 2048, 2048, 16, 16) | routed(64, 8),
        aliases=STACKED,
        experts=Experts(width="ffn"),
    ),
    "gpt_oss": Family(
        defaults=sizes(201088, 2880, 2880, 36, 64, 8, head_dim=64, attention_bias=True) | routed(128, 4),
        aliases=STACKED,
        attention=attention("attention_bias", "attention_bias"),
        feed_forward=(),
        experts=Experts(width="ffn", bias=True),
        norms=(Norm("num_attention_heads"), RMS_NORM, RMS_NORM),  # the first are attention sinks
        outer_norms=(RMS_NORM,),
    ),
    "qwen2_moe": replace(
        QWEN2,
        defaults={
            **sizes(151936, 2048, 5632, 24, 16, 16, qkv_bias=True),
            **routed(60, 4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1),
        },
        attention=attention("qkv_bias"),
        experts=Experts(
            step="decoder_sparse_step",
            dense="mlp_only_layers",
            shared=(
                *gated(width="shared_expert_intermediate_size", path="mlp.shared_expert"),
                Linear("mlp.shared_expert_gate", "hidden", "one"),
            ),
            shared_width="shared_expert_intermediate_size",
        ),
        lora_default=(),
    ),
    "qwen3_moe": QWEN3_MOE,
    "glm4_moe": replace(
        QWEN3_MOE,
        defaults={
            **sizes(151552, 4096, 10944, 46, 96, 8),
            **routed(128, 8, moe_intermediate_size=1408, n_shared_experts=1, first_k_dense_replace=1),
        },
        aliases={"num_experts": "n_routed_experts"},
        attention=attention("attention_bias"),
        norms=(*(replace(norm, when="use_qk_norm") for norm in HEAD_NORMS), RMS_NORM, RMS_NORM),
        experts=_shared_experts(),
        complete=_shared_width,
    ),
    "deepseek_v2": replace(
        DEEPSEEK3,
        defaults={
            **DEEPSEEK3.defaults,
            **sizes(102400, 4096, 11008, 32, 32),
            **routed(64, None, moe_intermediate_size=1407, n_shared_experts=2, first_k_dense_replace=0),
        },
        feed_forward=gated("mlp_bias"),
        experts=_shared_experts("mlp_bias"),
    ),
    "deepseek_v3": DEEPSEEK3,
}
