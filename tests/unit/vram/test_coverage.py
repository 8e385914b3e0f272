"""Which runs take the trainer's fast path: told from config.json, whoever has written it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from qlora_vram.coverage import FAST_FAMILIES, longest_regular
from qlora_vram.gpus import SHIPPED
from qlora_vram.workload import Engine, Shape, engine
from tests.support import models
from tests.unit.vram.workloads import spec

H100 = next(gpu for gpu in SHIPPED if gpu.name == "H100")
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CONFIGS: list[tuple[dict[str, Any], int | None]] = [
    *(({"model_type": kind}, None) for kind in ("llama", "qwen2", "qwen3", "gpt_neox")),
    ({"model_type": "mistral"}, 4096),
    ({"model_type": "mistral", "sliding_window": 1024}, 1024),
    ({"model_type": "mistral", "sliding_window": None}, None),
    ({"model_type": "qwen2", "sliding_window": 1024}, None),
    ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, 1024),
    ({"model_type": "qwen3", "use_sliding_window": True}, 4096),
    ({"model_type": "phi3"}, None),
    ({"model_type": "phi3", "sliding_window": 2047}, 2047),
    ({"model_type": "phi3", "rope_scaling": LONGROPE}, 4096),
    ({"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 8192}, 8192),
    ({"model_type": "phi3", "rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 8192}}, 4096),
    ({"model_type": "phi3", "rope_scaling": LONGROPE, "sliding_window": 1024}, 1024),
    ({"model_type": "llama", "rope_scaling": LONGROPE | {"original_max_position_embeddings": 512}}, 512),
    ({"model_type": "phi3", "resid_pdrop": 0.1}, 0),
    ({"model_type": "llama", "hidden_act": "gelu"}, 0),
    ({"model_type": "qwen3", "attention_dropout": 0.1}, 0),
    ({"model_type": "gemma", "attention_dropout": 0.1}, None),
    ({"model_type": "qwen3", "rope_scaling": YARN}, None),
    ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 0),
]


@pytest.mark.parametrize(("config", "longest"), CONFIGS)
def test_a_config_and_what_transformers_makes_of_it_say_the_same(config: dict[str, Any], longest: int | None) -> None:
    values = copy.deepcopy(config)  # transformers completes what it is given
    completed = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    assert longest_regular(config) == longest_regular(completed) == longest


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": "4096"},
        {"model_type": "phi3", "sliding_window": -1},
        {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": None},
        {"model_type": "llama", "rope_scaling": LONGROPE},
    ],
)
def test_what_is_no_number_of_tokens_covers_no_row(config: dict[str, Any]) -> None:
    assert longest_regular(config) == 0


@pytest.mark.parametrize(("kind", "name"), FAST_FAMILIES.items())
def test_a_family_s_classes_are_those_of_transformers(kind: str, name: str) -> None:
    assert kind in CONFIG_MAPPING
    assert hasattr(transformers, f"{name}ForCausalLM")


@pytest.mark.parametrize(
    ("longest", "length", "taken"),
    [(None, 8192, "fast"), (2048, 2048, "fast"), (2047, 2048, "plain"), (0, 8, "plain")],
)
def test_rows_that_are_not_longer_than_a_window_take_the_fast_path(
    longest: int | None, length: int, taken: Engine
) -> None:
    facts = models.facts("Mistral-7B").model_copy(update={"regular_length": longest})
    job = spec(training={"maxSequenceLength": length})
    assert engine(job, facts, H100, Shape(1, 32)) == taken
    assert engine(job, facts, H100, replace(Shape(1, 32), gpus=2)) == "plain"
