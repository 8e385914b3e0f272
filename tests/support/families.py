"""A tiny model of each family: its config, and what is known of it beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # so that attention matters in an untrained model
}
GROUPED = SMALL | {"num_key_value_heads": 2}
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
GATED = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
FUSED = frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"})
REMOTE_CODE = Path(__file__).with_name("chatglm")


@dataclass(frozen=True, slots=True)
class Family:
    """One model type."""

    model_type: str
    config: Mapping[str, Any]
    """Keys of config.json."""
    linears: frozenset[str]
    """Names of the linear layers in a decoder layer: what all-linear means, and what is held in 4 bit."""
    default: frozenset[str] | None
    """Layers that PEFT adapts by default; None where it knows none."""
    listed: tuple[str, ...]
    """A list that a user would write."""
    pad_token: str | None = None
    """None where the model is published without one."""
    padding_side: str = "right"
    """As published."""
    own_code: bool = False
    """Comes with Python code of its own."""
    packs: bool = True
    """Whether packed rows stay apart in it."""


QV = frozenset({"q_proj", "v_proj"})
FAMILIES = (
    Family("gpt_neox", SMALL, FUSED, frozenset({"query_key_value"}), ("query_key_value",)),
    Family(
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8, "initializer_range": 0.1},
        frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}),
        QV,
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    Family("llama", GROUPED, GATED, QV, tuple(sorted(GATED))),
    Family("mistral", GROUPED | {"sliding_window": 32}, GATED, QV, ("q_proj", "v_proj")),
    Family("qwen2", GROUPED, GATED, QV, tuple(sorted(GATED)), pad_token="<pad>"),
    Family("qwen3", GROUPED | {"head_dim": 16}, GATED, QV, tuple(sorted(ATTENTION)), pad_token="<pad>"),
    Family(
        "glm",
        GROUPED | {"head_dim": 16},
        ATTENTION | {"gate_up_proj", "down_proj"},
        None,
        ("q_proj", "gate_up_proj"),
        pad_token="</s>",
        padding_side="left",
    ),
    Family(
        "chatglm",
        {},
        FUSED,
        frozenset({"query_key_value"}),
        ("query_key_value", "mlp.dense_4h_to_h"),
        padding_side="left",
        own_code=True,
        packs=False,
    ),
    Family(
        "gemma",
        GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
        GATED,
        QV,
        ("q_proj", "o_proj"),
        pad_token="<pad>",
        padding_side="left",
    ),
    Family(
        "phi",
        GROUPED,
        frozenset({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        QV | {"fc1", "fc2"},
        ("q_proj", "dense"),
    ),
    Family(
        "falcon",
        {key: value for key, value in SMALL.items() if key != "intermediate_size"} | {"new_decoder_architecture": True},
        FUSED,
        frozenset({"query_key_value"}),
        ("query_key_value", "dense"),
        packs=False,
    ),
)


def write_model(family: Family, tokenizer: Any, folder: Path) -> Path:
    """A random model in bfloat16 with its tokenizer, as its repository looks on the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    if family.own_code:
        from tests.support.chatglm.configuration_chatglm import ChatGLMConfig
        from tests.support.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration

        auto_map = {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        }
        config = ChatGLMConfig(padded_vocab_size=len(tokenizer), initializer_range=0.1, auto_map=auto_map, **words)
        model = ChatGLMForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(family.model_type, **family.config, vocab_size=len(tokenizer), **words)
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family.own_code:
        for code in REMOTE_CODE.glob("*_chatglm.py"):
            shutil.copy(code, folder)
    return folder
