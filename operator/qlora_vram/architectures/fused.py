"""Families with one fused projection for query, key and value, or GPT's names; with layer norms and, mostly, biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_vram.architectures.layout import Condition, Family, Linear, Norm, Values
from qlora_vram.architectures.split import LAYER_NORM, QV, plain, sizes

FUSED = ("query_key_value",)
QKV = "queries+keys+keys"
GPT_ALIASES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def neox(path: str, bias: Condition = True) -> tuple[Linear, ...]:
    """Fused projection and output."""
    return (
        Linear(f"{path}.query_key_value", "hidden", QKV, bias),
        Linear(f"{path}.dense", "queries", "hidden", bias),
    )


def four_h(bias: Condition = True) -> tuple[Linear, ...]:
    """Up and down, under Megatron's names."""
    return plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias)


def _separate(path: str, bias: Condition = False) -> tuple[Linear, ...]:
    """Query, key and value under GPT-J's and OPT's names, in their order."""
    return (
        Linear(f"{path}.k_proj", "hidden", "hidden", bias),
        Linear(f"{path}.v_proj", "hidden", "hidden", bias),
        Linear(f"{path}.q_proj", "hidden", "hidden", bias),
        Linear(f"{path}.out_proj", "hidden", "hidden", bias),
    )


def _falcon(values: Values) -> Mapping[str, Any]:
    """Falcon says in switches how many key heads and norms there are."""
    heads, parallel = values["num_attention_heads"], bool(values["parallel_attn"])
    grouped, single = bool(values["new_decoder_architecture"]), bool(values["multi_query"])
    kv_heads = (values["num_key_value_heads"] or heads) if grouped or not single else 1
    if not grouped and not single:
        kv_heads = heads
    norms = values["num_ln_in_parallel_attn"] or (2 if grouped else 1)
    return {"num_key_value_heads": kv_heads, "second_norm": norms == 2 if parallel else True}


def _multi_query(values: Values) -> Mapping[str, Any]:
    return {"num_key_value_heads": 1 if values["multi_query"] else values["num_attention_heads"]}


def _chatglm(values: Values) -> Mapping[str, Any]:
    grouped = values["multi_query_attention"]
    return {
        "num_key_value_heads": values["multi_query_group_num"] if grouped else values["num_attention_heads"],
        "qkv_bias": values["add_qkv_bias"] or values["add_bias_linear"],
    }


def _opt(values: Values) -> Mapping[str, Any]:
    width, affine = values["word_embed_proj_dim"] or values["hidden_size"], values["layer_norm_elementwise_affine"]
    last = values["do_layer_norm_before"] and not values["_remove_final_layer_norm"]
    return {
        "embedding": width,
        "projected": width != values["hidden_size"],
        "final_norm": bool(last and affine),
        "positions": values["max_position_embeddings"] + 2,  # the first two are never used
    }


def _four_times(values: Values) -> Mapping[str, Any]:
    """No key of config.json changes the feed-forward width or the number of key heads."""
    return {"num_key_value_heads": values["num_attention_heads"], "intermediate_size": 4 * values["hidden_size"]}


GPT2 = Family(
    defaults=sizes(50257, 768, None, 12, 12, max_position_embeddings=1024, tie_word_embeddings=True),
    aliases=GPT_ALIASES,
    layers="transformer.h",
    attention=(
        Linear("attn.c_attn", "hidden", QKV, True),
        Linear("attn.c_proj", "hidden", "hidden", True),
    ),
    feed_forward=plain("mlp.c_fc", "mlp.c_proj", bias=True),
    norms=(LAYER_NORM, LAYER_NORM),
    outer_norms=(LAYER_NORM,),
    positions="max_position_embeddings",
    lora_default=("c_attn",),
    refuses=("add_cross_attention",),
)
GPTJ = Family(
    defaults=sizes(50400, 4096, None, 28, 16),
    aliases=GPT_ALIASES,
    layers="transformer.h",
    attention=_separate("attn"),
    feed_forward=plain("mlp.fc_in", "mlp.fc_out", bias=True),
    norms=(LAYER_NORM,),
    outer_norms=(LAYER_NORM,),
    head_bias=True,
    lora_default=QV,
)
GPT_NEOX = Family(
    defaults=sizes(50432, 6144, 24576, 44, 64, attention_bias=True),
    aliases={},
    layers="gpt_neox.layers",
    attention=neox("attention", "attention_bias"),
    feed_forward=four_h(),
    norms=(LAYER_NORM, LAYER_NORM),
    outer_norms=(LAYER_NORM,),
    lora_default=FUSED,
)
BLOOM = Family(
    defaults=sizes(250880, 64, None, 2, 8, tie_word_embeddings=True),
    aliases={"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    layers="transformer.h",
    attention=neox("self_attention"),
    feed_forward=four_h(),
    norms=(LAYER_NORM, LAYER_NORM),
    outer_norms=(LAYER_NORM, LAYER_NORM),
    lora_default=FUSED,
    complete=_four_times,
)
FALCON = Family(
    defaults=sizes(
        65024,
        4544,
        None,
        32,
        71,
        tie_word_embeddings=True,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        num_ln_in_parallel_attn=None,
        bias=False,
    ),
    aliases={"hidden_size": "n_embed", "intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
    layers="transformer.h",
    attention=neox("self_attention", "bias"),
    feed_forward=four_h("bias"),
    norms=(LAYER_NORM, Norm("hidden", bias=True, when="second_norm")),
    outer_norms=(LAYER_NORM,),
    lora_default=FUSED,
    complete=_falcon,
    packs=False,
)
OPT = Family(
    defaults=sizes(
        50272,
        768,
        3072,
        12,
        12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        word_embed_proj_dim=None,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
    ),
    aliases={"intermediate_size": "ffn_dim"},
    layers="model.decoder.layers",
    attention=_separate("self_attn", "enable_bias"),
    feed_forward=plain("fc1", "fc2", bias="enable_bias"),
    norms=(Norm("hidden", bias=True, when="layer_norm_elementwise_affine"),) * 2,
    outer_norms=(Norm("hidden", bias=True, when="final_norm"),),
    outer_linears=(
        Linear("model.decoder.project_out", "hidden", "embedding", when="projected"),
        Linear("model.decoder.project_in", "embedding", "hidden", when="projected"),
    ),
    embedding="embedding",
    positions="positions",
    lora_default=QV,
    complete=_opt,
)
MPT = Family(
    defaults=sizes(50368, 2048, None, 24, 16, tie_word_embeddings=True),
    aliases={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    layers="transformer.blocks",
    attention=(
        Linear("attn.Wqkv", "hidden", QKV),
        Linear("attn.out_proj", "hidden", "hidden"),
    ),
    feed_forward=plain("ffn.up_proj", "ffn.down_proj"),
    norms=(Norm("hidden"), Norm("hidden")),
    outer_norms=(Norm("hidden"),),
    lora_default=("Wqkv",),
    complete=_four_times,
    packs=False,
)
CHATGLM = Family(  # ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B; ChatGLM-6B's config has other names
    defaults=sizes(
        65024,
        4096,
        13696,
        28,
        32,
        head_dim=128,
        multi_query_attention=False,
        multi_query_group_num=1,
        add_qkv_bias=False,
        add_bias_linear=True,
        rmsnorm=True,
        post_layer_norm=True,
    ),
    aliases={
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "head_dim": "kv_channels",
    },
    layers="transformer.encoder.layers",
    attention=(
        Linear("self_attention.query_key_value", "hidden", QKV, "qkv_bias"),
        Linear("self_attention.dense", "queries", "hidden", "add_bias_linear"),
    ),
    feed_forward=(
        Linear("mlp.dense_h_to_4h", "hidden", "ffn+ffn", "add_bias_linear"),
        Linear("mlp.dense_4h_to_h", "ffn", "hidden", "add_bias_linear"),
    ),
    norms=(Norm("hidden", bias="!rmsnorm"),) * 2,
    outer_norms=(Norm("hidden", bias="!rmsnorm", when="post_layer_norm"),),
    head="transformer.output_layer",
    lora_default=FUSED,
    remote_code=True,
    whole_logits=True,  # hidden states are token by token, not row by row
    needs=("padded_vocab_size",),
    refuses=("pre_seq_len",),
    complete=_chatglm,
)
INTERNLM2 = Family(
    defaults=sizes(103168, 4096, 11008, 32, 32, bias=True),
    aliases={},
    attention=(
        Linear("attention.wqkv", "hidden", QKV, "bias"),
        Linear("attention.wo", "queries", "hidden", "bias"),
    ),
    feed_forward=(
        Linear("feed_forward.w1", "hidden", "ffn"),
        Linear("feed_forward.w3", "hidden", "ffn"),
        Linear("feed_forward.w2", "ffn", "hidden"),
    ),
    norms=(Norm("hidden"), Norm("hidden")),
    outer_norms=(Norm("hidden"),),
    head="output",
    remote_code=True,
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": GPT2,
    "gpt_bigcode": replace(GPT2, defaults={**GPT2.defaults, "multi_query": True}, complete=_multi_query),
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "codegen": replace(
        GPTJ,
        attention=(Linear("attn.qkv_proj", "hidden", QKV), Linear("attn.out_proj", "hidden", "hidden")),
        lora_default=("qkv_proj",),
    ),
    "gpt_neo": replace(
        GPTJ,
        defaults=sizes(50257, 2048, None, 24, 16, max_position_embeddings=2048, tie_word_embeddings=True),
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
        attention=(
            *_separate("attn.attention")[:3],
            Linear("attn.attention.out_proj", "hidden", "hidden", True),
        ),
        feed_forward=plain("mlp.c_fc", "mlp.c_proj", bias=True),
        norms=(LAYER_NORM, LAYER_NORM),
        positions="max_position_embeddings",
        head_bias=False,
    ),
    "bloom": BLOOM,
    "falcon": FALCON,
    "opt": OPT,
    "mpt": MPT,
    "chatglm": CHATGLM,
    "internlm2": INTERNLM2,
}
