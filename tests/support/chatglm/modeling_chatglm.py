"""The model: one projection for queries, keys and values, few key-value heads, rotation of half of each head, SwiGLU.

Module paths are ChatGLM2's, so that an adapter and the planner's description of the family find what they find there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


class SelfAttention(nn.Module):
    """Attention with groups of queries that share keys and values."""

    def __init__(self, config: ChatGLMConfig, number: int) -> None:
        super().__init__()
        self.number, self.size = number, config.kv_channels
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        width = self.size * (self.heads + 2 * self.groups)
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.size * self.heads, config.hidden_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Hidden states [rows, tokens, width]."""
        rows, tokens, _ = hidden.shape
        mixed = self.query_key_value(hidden).view(rows, tokens, -1, self.size).transpose(1, 2)
        queries, keys, values = mixed.split([self.heads, self.groups, self.groups], dim=1)
        queries, keys = rotate(queries, positions), rotate(keys, positions)
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return self.dense(seen.transpose(1, 2).reshape(rows, tokens, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """SwiGLU, gate and value in one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, tokens, width]."""
        gate, value = self.dense_h_to_4h(hidden).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * value)  # type: ignore[no-any-return]


class GLMBlock(nn.Module):
    """A decoder layer."""

    def __init__(self, config: ChatGLMConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, number)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = Mlp(config)

    def forward(self, hidden: torch.Tensor, *where: Any) -> torch.Tensor:
        """Hidden states [rows, tokens, width]."""
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), *where)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class GLMTransformer(nn.Module):
    """The decoder layers, checkpointed all or not at all."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(GLMBlock(config, number) for number in range(config.num_layers))
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: torch.Tensor, *where: Any) -> torch.Tensor:
        """Hidden states [rows, tokens, width]."""
        for layer in self.layers:
            again = self.gradient_checkpointing and self.training
            hidden = self._gradient_checkpointing_func(layer, hidden, *where) if again else layer(hidden, *where)  # type: ignore[operator]
        return self.final_layernorm(hidden)  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Token embeddings."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLMModel(nn.Module):
    """Embeddings, decoder and output head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)


class ChatGLMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What AutoModelForCausalLM makes of the config's auto_map."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012 - transformers wants a list

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What reads token ids."""
        return self.transformer.embedding.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits."""
        return self.transformer.output_layer

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels [rows, tokens]."""
        hidden = self.get_input_embeddings()(input_ids)
        seen, tokens = past_key_values.get_seq_length() if past_key_values is not None else 0, input_ids.shape[1]
        order = torch.arange(seen + tokens, device=hidden.device)
        positions = order[None, seen:] if position_ids is None else position_ids
        mask = (order[None, :] <= order[seen:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        hidden = self.transformer.encoder(hidden, positions, mask, past_key_values)
        logits = self.transformer.output_layer(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def rotate(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of each head, whose numbers are taken in pairs, by its token's position."""
    turned, kept = heads.chunk(2, dim=-1)
    pairs = turned.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(pairs, device=heads.device) / pairs)
    angles = (positions[:, None, :, None] * frequencies).to(heads.dtype)
    one, other = turned.unflatten(-1, (pairs, 2)).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    rotated = torch.stack([one * cosine - other * sine, other * cosine + one * sine], dim=-1).flatten(-2)
    return torch.cat([rotated, kept], dim=-1)
