"""The config."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class OldConfig(PretrainedConfig):
    """Of the model."""

    model_type = "old"

    def __init__(self, words: int = 259, hidden_size: int = 64, num_hidden_layers: int = 2, **others: Any) -> None:
        self.words, self.hidden_size, self.num_hidden_layers = words, hidden_size, num_hidden_layers
        super().__init__(**others)
