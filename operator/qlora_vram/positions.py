"""How long a row may be, in models whose position embeddings or angles are a table with an end.

Most models compute them as far as a row goes. The others fail at the first position beyond, on a GPU by an assertion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TABLES = {
    "biogpt": ("max_position_embeddings", 1024),
    "codegen": ("n_positions", 2048),
    "ctrl": ("n_positions", 256),
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "gpt_neo": ("max_position_embeddings", 2048),
    "gptj": ("n_positions", 2048),
    "mpt": ("max_seq_len", 2048),
    "openai-gpt": ("n_positions", 512),
    "opt": ("max_position_embeddings", 2048),
}
"""Model type → the key of config.json that says it, and transformers' default."""


def longest_row(config: Mapping[str, Any]) -> int | None:
    """Tokens that a row of this config.json's model may have. None: as many as one likes, or nothing is known."""
    key, default = TABLES.get(str(config.get("model_type")), ("", None))
    found = config.get(key, default)
    return found if isinstance(found, int) else None
