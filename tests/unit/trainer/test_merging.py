"""Adding an adapter to a base model tensor by tensor: the same as PEFT's merge of the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from qlora_trainer.checkpoint_files import index_of, plan_shards, write_shard
from qlora_trainer.merging import Merge, plan_merge
from qlorajob.errors import Reason, StepError

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama, tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama, deeper": lambda: LlamaConfig(**GROUPED | {"num_hidden_layers": 3}),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=8),
    "glm4": lambda: Glm4Config(**GROUPED, head_dim=8),
    "falcon": lambda: FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    ),
    "gptj": lambda: GPTJConfig(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, initializer_range=0.2
    ),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
}
FAMILIES = [family for family in CONFIGS if family != "llama, deeper"]
BFLOAT16_ULP = 2**-7
"""Distance of neighbouring bfloat16 numbers, relative to the smaller one: at most."""


class Case:
    """A base model and an adapter, as folders."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"

    def make(self, family: str, **lora: Any) -> Case:
        """Save a random model, and an adapter of which nothing is zero."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16)
        model.save_pretrained(self.base)
        targets = list(ATTENTION) if family == "mixtral" else "all-linear"
        lora = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"} | lora
        tuned = get_peft_model(model, LoraConfig(**lora))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        tuned.save_pretrained(str(self.adapter), save_embedding_layers=False)
        return self

    def plan(self, dtype: torch.dtype = torch.bfloat16) -> Merge:
        """Match base and adapter."""
        return plan_merge(self.base, self.adapter, dtype, trust_remote_code=False)

    def merge(self, dtype: torch.dtype = torch.bfloat16, limit: int = 20_000) -> Any:
        """Write the merged model in small shards, and load it as a user would."""
        merge = self.plan(dtype)
        self.merged.mkdir()
        shards = plan_shards(merge.tensors, limit)
        for shard in shards:
            write_shard(self.merged / shard.file, shard, merge.compute)
        if len(shards) > 1:
            (self.merged / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
        (self.merged / "config.json").write_bytes((self.base / "config.json").read_bytes())
        model, info = AutoModelForCausalLM.from_pretrained(self.merged, dtype=dtype, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model

    def merged_by_peft(self, dtype: torch.dtype) -> Any:
        """PEFT's merge of the whole model."""
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype)
        return PeftModel.from_pretrained(model, str(self.adapter)).merge_and_unload()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_is_peft_s_merge_in_float32_rounded_once(case: Case, family: str) -> None:
    merged = case.make(family).merge().state_dict()
    exact = case.merged_by_peft(torch.float32).state_dict()
    assert merged.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(merged[name], value.bfloat16(), rtol=BFLOAT16_ULP, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_is_peft_s_16_bit_merge_to_the_rounding_of_its_update(case: Case, family: str) -> None:
    merged = case.make(family).merge().state_dict()
    theirs = case.merged_by_peft(torch.bfloat16).state_dict()
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16).state_dict()
    for name, value in theirs.items():
        # PEFT rounds the update before it adds it: up to half a step of the larger of weight and update.
        largest = torch.maximum(base[name].float().abs(), (value.float() - base[name].float()).abs())
        step = BFLOAT16_ULP * torch.maximum(largest, value.float().abs())
        assert bool(((merged[name].float() - value.float()).abs() <= step).all()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapted_layer_has_changed_and_nothing_else(case: Case, family: str) -> None:
    merged = case.make(family).merge().state_dict()
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16).state_dict()
    adapter = load_file(case.adapter / "adapter_model.safetensors")
    adapted = {
        name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        for name in adapter
        if "lora_A" in name
    }
    assert adapted
    assert {name for name in base if not torch.equal(base[name], merged[name])} == adapted


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "qwen2"])
def test_trained_biases_are_merged_too(case: Case, family: str, bias: str) -> None:
    merged = case.make(family, bias=bias).merge().state_dict()
    exact = case.merged_by_peft(torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.bfloat16).state_dict()
    changed = [name for name in base if name.endswith("bias") and not torch.equal(base[name], merged[name])]
    assert changed
    for name, value in exact.items():
        torch.testing.assert_close(merged[name], value.bfloat16(), rtol=BFLOAT16_ULP, atol=1e-6, msg=name)


def logits_of(model: Any) -> torch.Tensor:
    """Logits in float32, so that only the weights' rounding differs."""
    with torch.no_grad():
        return model.float().eval()(torch.arange(32)[None] + 2).logits  # type: ignore[no-any-return]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())


LOGITS_ROUNDING = 0.01
"""What rounding each weight to bfloat16 (0.2 % on average) does to the logits of a model of two layers, at most."""


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen2", "phi3"])
def test_the_merged_model_s_logits_are_those_of_base_and_adapter(case: Case, family: str) -> None:
    merged = case.make(family).merge()
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(case.adapter))
    assert distance(logits_of(merged), logits_of(tuned)) < LOGITS_ROUNDING


def test_merging_into_weights_that_were_quantized_would_not_give_them(case: Case) -> None:
    case.make("llama")
    exact = logits_of(case.merged_by_peft(torch.float32))
    path = case.base / "model.safetensors"
    weights = load_file(path)
    for name, value in weights.items():
        if "proj" in name:
            weights[name] = dequantize_4bit(*quantize_4bit(value, quant_type="nf4")).to(value.dtype)
    save_file(weights, path, metadata={"format": "pt"})
    assert distance(logits_of(case.merge()), exact) > 3 * LOGITS_ROUNDING


@pytest.mark.parametrize(
    "rank", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 1}}]
)
def test_the_update_is_scaled_as_peft_does(case: Case, rank: dict[str, Any]) -> None:
    merged = case.make("llama", **rank).merge(torch.float32).state_dict()
    exact = case.merged_by_peft(torch.float32).state_dict()
    for name, value in exact.items():
        torch.testing.assert_close(merged[name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_merged_weights_have_the_wanted_type(case: Case, dtype: torch.dtype) -> None:
    case.make("llama").merge(dtype)
    stored = [value for path in case.merged.glob("*.safetensors") for value in load_file(path).values()]
    assert {value.dtype for value in stored} == {dtype}


def test_a_checkpoint_whose_names_lack_the_model_s_prefix_is_merged_under_its_own_names(case: Case) -> None:
    case.make("gpt2")  # as the original GPT-2 is stored
    path = case.base / "model.safetensors"
    short = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(short, path, metadata={"format": "pt"})
    merged = case.merge().state_dict()
    for name, value in case.merged_by_peft(torch.float32).state_dict().items():
        torch.testing.assert_close(merged[name], value.bfloat16(), rtol=BFLOAT16_ULP, atol=1e-6, msg=name)
    assert {tensor.name for tensor in case.plan().tensors} == set(short)


@pytest.mark.parametrize("zipped", [True, False], ids=["torch 1.6 and newer", "older"])
def test_pickled_checkpoints_are_merged(case: Case, zipped: bool) -> None:
    case.make("gpt_neox")
    exact = case.merged_by_peft(torch.float32).state_dict()
    whole = case.base / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    parts = dict.fromkeys(weights, "pytorch_model-00001-of-00002.bin")
    parts |= dict.fromkeys(list(weights)[::2], "pytorch_model-00002-of-00002.bin")
    for part in set(parts.values()):
        content = {name: weights[name] for name in weights if parts[name] == part}
        torch.save(content, case.base / part, _use_new_zipfile_serialization=zipped)
    (case.base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    merged = case.merge().state_dict()
    for name, value in exact.items():
        torch.testing.assert_close(merged[name], value.bfloat16(), rtol=BFLOAT16_ULP, atol=1e-6, msg=name)


def test_what_the_model_doesn_t_know_travels_unchanged(case: Case) -> None:
    case.make("llama")
    path = case.base / "model.safetensors"
    frequencies = torch.rand(4, dtype=torch.float32)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies, "mask": torch.tensor([True, False])}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    merge = case.plan(torch.float16)
    values = {tensor.name: merge.compute(tensor) for tensor in merge.tensors}
    for name, value in extra.items():
        assert torch.equal(values[name], value)


def test_an_adapter_whose_layer_isn_t_in_the_files_is_refused(case: Case) -> None:
    case.make("llama")
    path = case.base / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        case.plan()
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "merge.enabled")


def test_an_adapter_of_experts_is_refused(case: Case) -> None:
    case.make("mixtral", target_modules="all-linear")  # the files hold each expert, the model all of them in one tensor
    with pytest.raises(StepError, match="in another form") as caught:
        case.plan()
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "merge.enabled")


def test_an_adapter_of_another_model_is_refused(case: Case, tmp_path: Path) -> None:
    case.make("llama")
    other = Case(tmp_path / "other").make("llama, deeper")
    case.adapter = other.adapter
    with pytest.raises(StepError, match="the adapter in storage") as caught:
        case.plan()
    assert caught.value.reason is Reason.MODEL_INVALID


def test_weights_that_float16_can_t_hold_are_refused(case: Case) -> None:
    case.make("llama")
    path = case.base / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, path, metadata={"format": "pt"})
    merge = case.plan(torch.float16)
    norm = next(tensor for tensor in merge.tensors if tensor.name == "model.norm.weight")
    with pytest.raises(StepError, match="set bfloat16") as caught:
        merge.compute(norm)
    assert caught.value.field == "merge.dtype"


def test_an_adapter_that_isn_t_made_of_numbers_is_refused(case: Case) -> None:
    case.make("llama")
    path = case.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    merge = case.plan()
    layer = next(tensor for tensor in merge.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(StepError, match="isn't made of numbers"):
        merge.compute(layer)
