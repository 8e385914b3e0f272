"""Which models the trainer's fast path (`qlora_trainer.fast`) covers, as far as config.json tells.

The planner and the trainer ask the same functions, with config.json as it was published or as transformers completes
it: so what is planned for is what is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

FAST_FAMILIES: Final = {
    "llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3",
}  # fmt: skip
"""Model types that it knows, and how the names of transformers' classes begin."""
WINDOWS: Final = {"mistral": 4096, "phi3": None, "qwen2": 4096, "qwen3": 4096}
"""Families whose attention may have a sliding window, and its size where config.json doesn't name it; null is none."""
SWITCHED: Final = frozenset({"qwen2", "qwen3"})
"""Of these, those whose window is there only if use_sliding_window says so."""
STEADY_ROPE: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose frequencies are the same for rows of any length."""
LONG_ROPE: Final = "longrope"
"""One with other frequencies for rows that are longer than those of the model's first training."""
PHI3_ROPE: Final = {"su": LONG_ROPE, "yarn": LONG_ROPE}
"""Its names in Phi-3's older files."""
PHI3_LENGTH: Final = 4096
"""Tokens of those rows where Phi-3's config.json doesn't say."""
DROPOUTS: Final = ("attention_dropout", "resid_pdrop", "embd_pdrop")
"""Keys of dropouts beside the adapter's."""


def of_transformers(kind: str | None, model: type) -> bool:
    """Whether this class is the one that transformers has for a family: weights may come with a class of their own."""
    name = f"{FAST_FAMILIES.get(str(kind))}ForCausalLM"
    return model.__name__ == name and model.__module__.startswith("transformers.")


def irregularity(config: Mapping[str, Any]) -> str | None:
    """What the layers of one of these families do that the fast path doesn't, in rows of whatever length."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"the activation is {activation}"
    if any(config.get(key) for key in DROPOUTS):
        return "the layers have dropout"
    kind = _rope_type(config)
    if kind not in (*STEADY_ROPE, LONG_ROPE):
        return f"the position embedding {kind} depends on the batch"
    return None


def longest_regular(config: Mapping[str, Any]) -> int | None:
    """Rows of at most so many tokens take the fast path in one of its families. None: of any length; 0: none do.

    A sliding window changes nothing in rows that aren't longer, nor does a rotary embedding for long rows in others.
    For families that aren't covered the answer is None.
    """
    kind = config.get("model_type")
    if kind not in FAST_FAMILIES:
        return None
    if irregularity(config):
        return 0
    limits = (_window(config), _short_rows(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _window(config: Mapping[str, Any]) -> int | None:
    kind = config["model_type"]
    if kind not in WINDOWS or (kind in SWITCHED and not config.get("use_sliding_window")):
        return None
    size = config.get("sliding_window", WINDOWS[kind])
    return _number(size) if size else None


def _short_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of up to so many tokens have the short rows' frequencies."""
    if _rope_type(config) != LONG_ROPE:
        return None
    default = PHI3_LENGTH if config["model_type"] == "phi3" else _rope(config).get("original_max_position_embeddings")
    return _number(config.get("original_max_position_embeddings", default))


def _number(value: Any) -> int:
    """0 for what is none: then no row is covered, and transformers has its say."""
    return max(0, value) if isinstance(value, int) else 0


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("rope_scaling") or config.get("rope_parameters")
    return found if isinstance(found, Mapping) else {}


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = _rope(config)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return PHI3_ROPE.get(kind, kind) if config["model_type"] == "phi3" else kind
