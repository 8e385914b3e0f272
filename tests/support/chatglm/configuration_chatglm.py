"""Sizes of the model, under the names that ChatGLM2's config.json has."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):  # type: ignore[misc]
    """Of `chatglm`, a model type that transformers has no class for."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}  # noqa: RUF012 - as there

    def __init__(
        self,
        *,
        num_layers: int = 2,
        padded_vocab_size: int = 400,
        hidden_size: int = 64,
        ffn_hidden_size: int = 96,
        kv_channels: int = 16,
        num_attention_heads: int = 4,
        multi_query_attention: bool = True,
        multi_query_group_num: int = 2,
        layernorm_epsilon: float = 1e-5,
        rmsnorm: bool = True,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = True,
        **others: Any,
    ) -> None:
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.kv_channels = kv_channels
        self.num_attention_heads = num_attention_heads
        self.multi_query_attention = multi_query_attention
        self.multi_query_group_num = multi_query_group_num
        self.layernorm_epsilon = layernorm_epsilon
        self.rmsnorm = rmsnorm
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        super().__init__(**others)
