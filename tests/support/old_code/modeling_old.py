"""The model: each layer adds to a token what it makes of the mean of all tokens up to it.

As ChatGLM2's code does: no GenerationMixin and no post_init, a cache of tuples, `max_length` read from the config, an
output head that `get_output_embeddings` doesn't tell, layers built where memory is, without values; and, as Baichuan's,
a buffer that no file holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_old import OldConfig


class OldTransformer(nn.Module):
    """Everything but the way out of it."""

    def __init__(self, config: OldConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Embedding(config.words, width)
        self.register_buffer("scale", torch.linspace(0.5, 1, width), persistent=False)
        self.layers = nn.ModuleList(skip_init(nn.Linear, width, width) for _ in range(config.num_hidden_layers))
        self.output_layer = skip_init(nn.Linear, width, config.words, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states."""
        hidden, seen = self.embedding(ids) * self.scale, mask.unsqueeze(-1)
        for layer in self.layers:
            hidden = hidden + layer((hidden * seen).cumsum(1) / seen.cumsum(1).clamp(min=1)).tanh()
        return hidden


class OldForCausalLM(PreTrainedModel):
    """The whole."""

    config_class = OldConfig
    base_model_prefix = "transformer"

    def __init__(self, config: OldConfig) -> None:
        super().__init__(config)
        self.max_sequence_length = config.max_length
        self.transformer = OldTransformer(config)

    def _init_weights(self, module: nn.Module) -> None:
        return

    def get_input_embeddings(self) -> nn.Module:
        """Words in."""
        return self.transformer.embedding

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **options: Any) -> Any:
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(outputs)  # type: ignore[operator]
        model_kwargs["is_first_forward"] = False
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Any = None, is_first_forward: bool = True, **others: Any
    ) -> dict[str, Any]:
        """Of what was there before, only the cache."""
        return {"input_ids": input_ids if is_first_forward else input_ids[:, -1:], "past_key_values": past_key_values}

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: tuple[tuple[torch.Tensor, ...], ...] | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Loss and logits."""
        assert not past_key_values
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.transformer.output_layer(self.transformer(input_ids, mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
