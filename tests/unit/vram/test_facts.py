"""Facts from config.json alone, held to the module tree that transformers builds and to published totals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from transformers import CONFIG_MAPPING, AutoConfig

from qlora_trainer.meta_model import MetaModel
from qlora_vram import catalog
from qlora_vram.architectures import FAMILIES
from qlora_vram.facts import InvalidConfigError, blueprint, model_facts
from qlorajob.plan import ModelFacts
from tests.unit.vram.configs import configs, with_layers

PUBLISHED: Mapping[str, int] = json.loads(Path(__file__).with_name("published_parameters.json").read_text())
"""Parameters as the models' pages say, so far as transformers loads them: no matrix twice, no buffers."""
IN_TRANSFORMERS = sorted(name for name, family in FAMILIES.items() if not family.remote_code)
BUILT = [
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3.2-1B",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM3-3B",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-Nemo-Base-2407",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen2-7B",
    "Qwen/Qwen2-72B",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
    "google/gemma-7b",
    "google/gemma-2-9b",
    "google/gemma-3-1b-pt",
    "microsoft/phi-2",
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/Phi-3-medium-4k-instruct",
    "EleutherAI/gpt-neox-20b",
    "EleutherAI/gpt-j-6b",
    "gpt2",
    "tiiuae/falcon-7b",
    "tiiuae/falcon-40b",
    "THUDM/glm-4-9b-hf",
    "THUDM/GLM-4-9B-0414",
    "bigscience/bloom-7b1",
    "facebook/opt-350m",
    "facebook/opt-6.7b",
    "mosaicml/mpt-7b",
    "stabilityai/stablelm-2-1_6b",
    "allenai/OLMo-1B-hf",
    "deepseek-ai/DeepSeek-V2-Lite",
]


def _built(config: Mapping[str, Any]) -> MetaModel:
    """The modules of a config.json, as transformers builds them without memory for weights."""
    values = dict(config)
    return MetaModel(AutoConfig.for_model(values.pop("model_type"), **values))


def _check_same(config: Mapping[str, Any]) -> None:
    found, built = blueprint(config), _built(config)
    assert found is not None
    assert found.facts() == built.facts()
    assert found.linear_paths() == built.linear_paths()
    assert found.head_path() == built.head_path()


@pytest.mark.parametrize("name", BUILT)
def test_a_published_model_has_the_modules_that_transformers_builds(name: str) -> None:
    entry = catalog.find(name)
    assert entry is not None
    _check_same(entry.config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_published_number_of_parameters(name: str) -> None:
    facts = catalog.lookup(name)
    assert facts is not None
    assert facts.parameters == PUBLISHED[name]


@pytest.mark.parametrize("model_type", IN_TRANSFORMERS)
def test_what_a_config_leaves_out_has_transformers_default(model_type: str) -> None:
    layers = CONFIG_MAPPING[model_type]().num_hidden_layers
    assert blueprint({"model_type": model_type}).values["num_hidden_layers"] == layers  # type: ignore[union-attr]
    _check_same({"model_type": model_type} | with_layers(model_type, 4))


@pytest.mark.parametrize("model_type", IN_TRANSFORMERS)
@settings(max_examples=6)
@given(data=st.data())
def test_any_small_config_of_a_family_has_the_modules_that_transformers_builds(
    model_type: str, data: st.DataObject
) -> None:
    _check_same(data.draw(configs(model_type)))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@settings(max_examples=8)
@given(data=st.data())
def test_kinds_add_up_and_a_further_layer_only_adds(model_type: str, data: st.DataObject) -> None:
    config = {"padded_vocab_size": 64, **data.draw(configs(model_type))}
    less = model_facts(config)
    assert less is not None
    more = model_facts({**config, **with_layers(model_type, less.layers + 1)})
    assert more is not None
    for facts in (less, more):
        assert facts.parameters == sum(_kinds(facts))
        assert min(_kinds(facts)) >= 0
    assert more.parameters > less.parameters
    assert all(many >= few for few, many in zip(_kinds(less), _kinds(more), strict=True))


def _kinds(facts: ModelFacts) -> tuple[int, ...]:
    return (
        facts.quantized_parameters,
        facts.embedding_parameters,
        facts.head_parameters,
        facts.expert_parameters,
        facts.other_parameters,
    )


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_default_layers_for_an_adapter_are_peft_s(model_type: str) -> None:
    assert list(FAMILIES[model_type].lora_default) == list(PEFT_DEFAULTS.get(model_type, ()))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mamba"},
        {"model_type": "chatglm", "num_layers": 28, "vocab_size": 130528, "position_encoding_2d": True},  # ChatGLM-6B
        {"model_type": "chatglm", "padded_vocab_size": 65024, "pre_seq_len": 128},
        {"model_type": "gpt2", "add_cross_attention": True},
        {"model_type": "llama", "per_layer_config": {"0": {"intermediate_size": 64}}},
    ],
)
def test_what_is_built_otherwise_is_not_known(config: Mapping[str, Any]) -> None:
    assert model_facts(config) is None


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "4096"), ("vocab_size", None), ("num_hidden_layers", 0), ("n_experts", -1)]
)
def test_an_impossible_number_is_named(key: str, value: Any) -> None:
    config = {"model_type": "mixtral", key.replace("n_experts", "num_local_experts"): value}
    with pytest.raises(InvalidConfigError, match=key.replace("n_experts", "num_experts")):
        model_facts(config)


def test_an_older_name_of_a_key_counts() -> None:
    assert model_facts({"model_type": "bloom", "n_embed": 128}) == model_facts(
        {"model_type": "bloom", "hidden_size": 128}
    )
