"""A model's facts from its modules: what they call quantized is what bitsandbytes really replaces."""

from __future__ import annotations

from collections import Counter
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_trainer.meta_model import MetaModel

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4, "intermediate_size": 48, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", SMALL),
        ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}),  # Conv1D
        ("gptj", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),  # a head with a bias
        ("falcon", SMALL),  # linear layers of its own class
        ("olmo", SMALL | {"tie_word_embeddings": True}),  # no norm behind the last linear layer
        ("mixtral", SMALL | MIXTURE),  # stacked experts
        ("helium", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}),
    ],
)
def test_the_linear_layers_are_those_that_bitsandbytes_replaces(model_type: str, values: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type, **values)
    facts = MetaModel(config).facts()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    replaced = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    )
    assert replaced == {(each.name, each.inputs, each.outputs): each.count for each in facts.linears}
    assert facts.parameters == sum(parameter.numel() for parameter in MetaModel(config)._model.parameters())


def test_convolutions_are_no_experts() -> None:
    values = SMALL | {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64, "expand": 2}
    facts = MetaModel(AutoConfig.for_model("mamba", **values)).facts()
    assert facts.expert_parameters == 0
    assert facts.other_parameters > 0


def test_a_size_that_differs_between_layers_is_the_largest() -> None:
    facts = MetaModel(AutoConfig.for_model("gemma4_text", num_hidden_layers=6)).facts()
    assert (facts.layers, facts.head_size) == (6, 512)
