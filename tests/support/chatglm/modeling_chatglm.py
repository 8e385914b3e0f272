"""The model: one projection for queries, keys and values, few key-value heads, rotation of half of each head, SwiGLU.

Module paths are ChatGLM2's, so that an adapter and the planner's description of the family find what they find there.
So is what sets its interface apart from transformers' own models: hidden states leave the body token by token, not row
by row, nobody is told where the output head is, and the forward pass takes no other arguments than it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states [tokens, rows, width]."""
        hidden = self.embedding.word_embeddings(input_ids)
        seen, tokens = past_key_values.get_seq_length() if past_key_values is not None else 0, input_ids.shape[1]
        order = torch.arange(seen + tokens, device=hidden.device)
        positions = order[None, seen:] if position_ids is None else position_ids
        mask = (order[None, :] <= order[seen:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        hidden = self.encoder(hidden, positions, mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden.transpose(0, 1), past_key_values=past_key_values)


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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [rows, tokens, vocabulary], and the mean loss of the labels [rows, tokens] where there are any."""
        body = self.transformer(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        hidden = body.last_hidden_state
        logits = self.transformer.output_layer(hidden).transpose(0, 1).contiguous()
        loss = None
        if labels is not None:
            logits = logits.float()
            shifted = logits[:, :-1].contiguous()
            loss = functional.cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten())
            logits, loss = logits.to(hidden.dtype), loss.to(hidden.dtype)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=body.past_key_values)


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
