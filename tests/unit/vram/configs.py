"""Small random configs of every family, as config.json would hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

from qlora_vram.architectures import FAMILIES, Family, Linear, Norm

HEAD_FROM_HIDDEN = {"stablelm", "cohere2", "deepseek_v2", "deepseek_v3", "phi", "olmoe"}
"""Families that take their heads' width, or a part of it, from elsewhere, whatever head_dim says."""
NOT_FROM_CONFIG = {"second_norm", "projected", "final_norm", "qkv_bias", "q_lora_rank"}
"""Conditions that follow from other keys."""
WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim")


def with_layers(model_type: str, layers: int) -> dict[str, Any]:
    """The keys that say how many layers there are."""
    keys: dict[str, Any] = {FAMILIES[model_type].aliases.get("num_hidden_layers", "num_hidden_layers"): layers}
    if model_type == "gpt_neo":
        keys["attention_types"] = [[["global"], layers]]  # checked by transformers; adds no parameter
    return keys


def switches(family: Family) -> set[str]:
    """Keys of config.json that are true or false."""
    experts = family.experts
    parts: Iterator[Linear | Norm] = iter(
        (
            *family.attention,
            *family.feed_forward,
            *family.norms,
            *family.outer_norms,
            *family.outer_linears,
            *(experts.shared if experts else ()),
        )
    )
    conditions = {condition for part in parts for condition in (part.bias, part.when)} | {family.head_bias}
    named = {condition.removeprefix("!") for condition in conditions if isinstance(condition, str)}
    own = {key for key, default in family.defaults.items() if isinstance(default, bool)}
    derived = NOT_FROM_CONFIG - set(family.defaults)
    return (named - derived) | own


@st.composite
def configs(draw: st.DrawFn, model_type: str) -> Mapping[str, Any]:
    """A config.json of a model type, small enough to build in milliseconds."""
    family = FAMILIES[model_type]
    heads, head = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.sampled_from([8, 16]))
    layers = draw(st.integers(1, 4))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(5, 300)),
        "pad_token_id": 0,
        "hidden_size": heads * head,
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 40)) * 8,
        **{key: draw(st.booleans()) for key in sorted(switches(family))},
    }
    if family.defaults.get("num_key_value_heads") is not None or "num_kv_heads" in family.aliases.values():
        values["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0]))
    if family.attention[0].outputs == "queries" and model_type not in HEAD_FROM_HIDDEN and draw(st.booleans()):
        values["head_dim"] = draw(st.sampled_from([4, 8, 32]))
    if "head_dim" in family.defaults:
        values.setdefault("head_dim", 8)
    if family.positions:
        values["max_position_embeddings"] = draw(st.integers(4, 50))
    values |= {key: draw(st.sampled_from([8, 24])) for key in WIDTHS if key in family.defaults}
    values |= _numbers(draw, family, layers)
    named = {family.aliases.get(key, key): value for key, value in values.items()}
    return {"model_type": model_type} | with_layers(model_type, layers) | named


def _numbers(draw: st.DrawFn, family: Family, layers: int) -> dict[str, Any]:
    choices: dict[str, st.SearchStrategy[Any]] = {
        "num_experts": st.integers(1, 5),
        "num_experts_per_tok": st.integers(1, 3),
        "n_shared_experts": st.integers(1, 3),
        "first_k_dense_replace": st.integers(0, layers),
        "decoder_sparse_step": st.integers(1, 3),
        "mlp_only_layers": st.sampled_from([[], [0]]),
        "q_lora_rank": st.sampled_from([None, 8]),
        "qk_rope_head_dim": st.sampled_from([8, 16]),
        "word_embed_proj_dim": st.sampled_from([8, 64]),
        "num_ln_in_parallel_attn": st.sampled_from([None, 1, 2]),
    }
    present = set(family.defaults) | ({"mlp_only_layers"} if family.experts and family.experts.dense else set())
    return {key: draw(choice) for key, choice in choices.items() if key in present}
