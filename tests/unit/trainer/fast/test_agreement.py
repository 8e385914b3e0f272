"""What is planned for is what is done: planner and trainer decide alike which runs take the fast path.

The planner reads config.json as it is published, the trainer the model that transformers makes of it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bench.models import build
from qlora_trainer.fast.step import start
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter
from qlora_trainer.shapes import Shapes
from qlora_vram.facts import model_facts
from qlora_vram.gpus import SHIPPED, GpuClass
from qlora_vram.workload import Engine, Shape, engine, types_on
from qlorajob.plan import Plan, Requests
from qlorajob.spec import QLoRAJobSpec
from tests.unit.vram.workloads import spec

Json = dict[str, Any]
GPUS = {gpu.name: gpu for gpu in SHIPPED}
TINY: Json = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LLAMA3: Json = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
YARN: Json = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def longrope(size: int, **more: Any) -> Json:
    """As configs have it, for heads of which so many numbers are rotated."""
    return {"type": "longrope", "short_factor": [1.0] * (size // 2), "long_factor": [2.0] * (size // 2), **more}


PHI3_LONG: Json = {"model_type": "phi3", "rope_scaling": longrope(16), "original_max_position_embeddings": 512}
MODELS: list[Json] = [
    *({"model_type": kind} for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma", "olmo2")),
    *({"model_type": kind} for kind in ("granite", "smollm3", "cohere", "stablelm", "gemma2", "glm")),
    *({"model_type": kind, "tie_word_embeddings": True} for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    *({"model_type": kind, "attention_dropout": 0.1} for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    *({"model_type": kind, "hidden_act": "gelu"} for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    *({"model_type": "llama", "rope_scaling": rope} for rope in (LLAMA3, YARN, {"type": "linear", "factor": 2.0})),
    {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "llama", "rope_scaling": longrope(16, original_max_position_embeddings=1024)},
    {"model_type": "llama", "rope_scaling": longrope(16, original_max_position_embeddings=512)},
    {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"model_type": "llama", "hidden_act": "swish"},
    {"model_type": "llama", "attention_bias": True},
    {"model_type": "llama", "mlp_bias": True},
    {"model_type": "llama", "head_dim": 32},
    {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    {"model_type": "mistral", "sliding_window": 1024},
    {"model_type": "mistral", "sliding_window": 512},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 1},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 512},
    {"model_type": "qwen2", "rope_scaling": YARN},
    {"model_type": "qwen3", "attention_bias": True, "head_dim": 32},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 512, "layer_types": ["full_attention"] * 2},
    {"model_type": "qwen3", "rope_scaling": YARN},
    {"model_type": "phi3", "partial_rotary_factor": 0.75},
    {"model_type": "phi3", "sliding_window": 1023},
    {"model_type": "phi3", "sliding_window": 2047},
    {"model_type": "phi3", "resid_pdrop": 0.1},
    {"model_type": "phi3", "embd_pdrop": 0.1},
    PHI3_LONG,
    PHI3_LONG | {"original_max_position_embeddings": 1024},
    PHI3_LONG | {"rope_scaling": longrope(16, type="su", original_max_position_embeddings=512)},
    PHI3_LONG | {"rope_scaling": longrope(16, type="yarn")},
]
JOBS: list[Json] = [
    {"quantization": {"type": "fp4"}},
    {"quantization": {"doubleQuant": False}},
    {"quantization": {"computeDtype": "float16"}},
    {"quantization": {"computeDtype": "float32"}},
    {"quantization": {"computeDtype": "bfloat16"}, "training": {"precision": "fp16"}},
    {"training": {"precision": "fp16"}},
    {"training": {"precision": "fp32"}},
    {"lora": {"targetModules": ["q_proj", "v_proj"], "dropout": 0.1}},
    {"lora": {"targetModules": ["down_proj"], "rank": 5}},
    {"lora": {"targetModules": "default"}},
    {"lora": {"bias": "all"}},
    {"lora": {"bias": "lora_only", "targetModules": ["q_proj"]}},
]


def decided(config: Json, job: QLoRAJobSpec, gpu: GpuClass, gpus: int = 1) -> tuple[Engine, Engine, list[str]]:
    """What is planned, what is done, and why it is less than the fast path."""
    facts = model_facts(copy.deepcopy(config))  # transformers completes what it is given
    assert facts is not None
    planned = engine(job, facts, gpu, Shape(1, 2, gpus=gpus))
    values = copy.deepcopy(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = add_adapter(build(made, device="cpu", dtype=torch.float32, quant_type=job.quantization.type), job.lora)
    hardware = Hardware("cuda", types_on(gpu, job), "paged_adamw_8bit")
    plan = Plan(
        gpu_class=gpu.name, gpus=gpus, predicted_peak_bytes=1, micro_batch_size=1, gradient_accumulation=1,
        checkpointing="full", requests=Requests(cpu="1", memory="1Gi", ephemeral_storage="1Gi"), reason="a test",
    )  # fmt: skip
    longest = job.training.max_sequence_length
    taken = start(
        model.train(), plan, hardware, torch.Tensor.backward, Shapes.of(1, [64], longest, packed=True), longest
    )
    return planned, "fast" if taken else "plain", hardware.degradations


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.parametrize("config", MODELS, ids=lambda config: "-".join(f"{value}" for value in config.values())[:48])
def test_a_model_is_planned_for_the_path_that_it_takes(config: Json) -> None:
    job = spec(training={"maxSequenceLength": 1024})
    planned, taken, reasons = decided(TINY | {"tie_word_embeddings": False} | config, job, GPUS["H100"])
    assert planned == taken, reasons


@pytest.mark.parametrize("sections", JOBS, ids=str)
def test_a_job_is_planned_for_the_path_that_it_takes(sections: Json) -> None:
    planned, taken, reasons = decided(TINY | {"model_type": "qwen2"}, spec(**sections), GPUS["H100"])
    assert planned == taken, reasons


def test_biases_to_train_that_a_model_has_not_are_planned_for_with_care() -> None:
    """From the facts alone they aren't told from norms. The plain path takes more."""
    planned, taken, _ = decided(TINY | {"model_type": "llama"}, spec(lora={"bias": "all"}), GPUS["H100"])
    assert (planned, taken) == ("plain", "fast")


def test_several_gpus_or_an_older_one_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(TINY | {"model_type": "llama"}, spec(), GPUS["H100"], gpus=2)[:2] == ("plain", "plain")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert decided(TINY | {"model_type": "llama"}, spec(), GPUS["T4"])[:2] == ("plain", "plain")
