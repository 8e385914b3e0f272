"""The recipes: whose shape, how long their rows are, what their authors say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_cli.manifests import load_manifest
from qlora_vram.catalog import find
from qlorajob.spec import QLoRAJobSpec

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One manifest of examples/."""

    manifest: str
    model: str
    """Name in the catalogue of a model of the same shape."""
    mean_length: int
    """Tokens of its rows: a log-normal distribution with this mean, cut at maxSequenceLength. The data themselves can't
    be had here, so these are estimates of what they hold."""
    spread: float
    rows_are: str
    claim: str
    config: dict[str, Any] = field(default_factory=dict)
    """The shape, where the catalogue's own won't do."""
    targets: tuple[str, ...] = ()
    """Target modules, where the manifest's mean another architecture's."""
    note: str = ""

    @property
    def name(self) -> str:
        """r0 … r4."""
        return self.manifest[:2]

    def spec(self, steps: int) -> QLoRAJobSpec:
        """The manifest's own spec, for so many steps and without what comes beside training."""
        spec = load_manifest(EXAMPLES / f"{self.manifest}.yaml").spec
        training = spec.training.model_copy(update={"max_steps": steps, "epochs": None, "save_steps": 0})
        dataset = spec.dataset.model_copy(update={"validation": None})
        lora = spec.lora.model_copy(update={"target_modules": self.targets} if self.targets else {})
        return spec.model_copy(update={"training": training, "dataset": dataset, "lora": lora})

    def shape(self) -> dict[str, Any]:
        """The essential part of config.json."""
        entry = find(self.model)
        found = dict(self.config or (entry.config if entry else {}))
        if not found:
            raise LookupError(f"{self.model} isn't in the catalogue")
        return found

    def lengths(self, rows: int, limit: int, *, full: bool) -> list[int]:
        """Tokens of each row: the recipe's, or all of the limit."""
        if full:
            return [limit] * rows
        draw = np.random.default_rng(0).lognormal(math.log(self.mean_length) - self.spread**2 / 2, self.spread, rows)
        return [int(min(limit, max(8, value))) for value in draw]


CHATGLM2_AS_GLM = {
    "model_type": "glm", "num_hidden_layers": 28, "hidden_size": 4096, "intermediate_size": 13696, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 2, "vocab_size": 65024, "attention_bias": True,
    "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "r0-gpt-neox-20b-quotes", "EleutherAI/gpt-neox-20b", 45, 0.7, "quotations",
            "peak 15 GB; 20 steps in 5 minutes on a free GPU",
        ),
        Recipe(
            "r1-llama-2-7b-contradictions", "meta-llama/Llama-2-7b-hf", 95, 0.15, "SNLI pairs in the Alpaca prompt",
            "fits a free 16 GB GPU",
        ),
        Recipe(
            "r2-qwen2-7b-instructions", "Qwen/Qwen2-7B", 200, 0.6, "instructions with answers",
            "about 6 GB (at 1 × 512); 1.5 samples/s",
        ),
        Recipe(
            "r3-llama3-chatqa-8b-guanaco", "meta-llama/Meta-Llama-3-8B", 400, 0.7, "conversations",
            "fits a free 16 GB GPU",
        ),
        Recipe(
            "r4-chatglm2-6b-knowledge-base", "THUDM/chatglm2-6b", 120, 0.5, "keywords and a description",
            "fits 11 GB (RTX 2080 Ti)", CHATGLM2_AS_GLM, ("q_proj", "k_proj", "v_proj"),
            "ChatGLM2's shape in transformers' GLM, whose q, k and v are layers of their own: the model's code comes "
            "with its weights, which can't be had here",
        ),
    )
}  # fmt: skip

TINY: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
"""What --tiny puts over a shape, to try the command without a GPU."""
