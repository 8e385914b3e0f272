"""The five recipes, setting by setting: what reaches Hugging Face's libraries from the manifests under examples/.

Each row is a setting of the recipe's table, where it ends up, and the value it has there. A pair of values is for a
GPU with bfloat16, and for the one without it that the recipe ran on. Steps are those of 1,000 rows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_trainer import unsloth_backend
from qlora_trainer.data import load_data
from qlora_trainer.formats import IGNORED
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter, load_quantized
from qlora_trainer.tokenizer import load_tokenizer
from qlora_trainer.training import make_trainer
from qlora_vram.changes import with_field
from qlora_vram.gpus import SHIPPED
from qlora_vram.planner import plan
from qlorajob.plan import Plan
from qlorajob.precision import NumberTypes
from qlorajob.spec import LoraSpec
from tests.golden.recipes import (
    BF16_GPU,
    CONFIGS,
    FP16_GPU,
    OTHERS,
    build,
    facts_of,
    gpu_class,
    planned_on,
    spec_of,
)
from tests.unit.trainer.jobs import Job

Row = tuple[str, str, Any]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class OnEach(tuple[Any, Any]):
    """A value for the GPU with bfloat16 and one for the GPU without."""

    __slots__ = ()


R0: list[Row] = [
    ("base model", "spec.model.uri", "hf://EleutherAI/gpt-neox-20b"),
    ("4 bit", "bits.load_in_4bit", True),
    ("nf4", "bits.bnb_4bit_quant_type", "nf4"),
    ("double quantization", "bits.bnb_4bit_use_double_quant", True),
    ("compute bfloat16", "bits.bnb_4bit_compute_dtype", OnEach((BF16, FP16))),
    ("gradient checkpointing", "plan.checkpointing", "full"),
    ("LoRA r", "lora.r", 8),
    ("LoRA alpha", "lora.lora_alpha", 32),
    ("LoRA dropout", "lora.lora_dropout", 0.05),
    ("LoRA target", "lora.target_modules", {"query_key_value"}),
    ("LoRA bias", "lora.bias", "none"),
    ("LoRA task", "lora.task_type", "CAUSAL_LM"),
    ("dataset", "spec.dataset.uri", "hf://Abirate/english_quotes"),
    ("column", "spec.dataset.columns.text", "quote"),
    ("plain causal language modelling", "spec.dataset.format", "text"),
    ("micro batch", "arguments.per_device_train_batch_size", 1),
    ("accumulation", "arguments.gradient_accumulation_steps", 8),
    ("warm-up steps", "arguments.warmup_steps", 2),
    ("max steps", "arguments.max_steps", 20),
    ("learning rate", "arguments.learning_rate", 2e-4),
    ("fp16", "arguments.fp16", True),
    ("no bf16 beside it", "arguments.bf16", False),
    ("log every step", "arguments.logging_steps", 1),
    ("paged 8-bit AdamW", "arguments.optim", "paged_adamw_8bit"),
    ("check: prompt", "spec.evaluation.prompts", ("Ask not what your country",)),
    ("check: new tokens", "spec.evaluation.max_new_tokens", 20),
]
R1: list[Row] = [
    ("base model", "spec.model.uri", "hf://abhishek/llama-2-7b-hf-small-shards"),
    ("remote code trusted", "spec.model.trust_remote_code", True),
    ("contradictions only", "spec.dataset.filter", {"gold_label": "contradiction"}),
    ("instruction rows", "spec.dataset.format", "instruction"),
    ("nf4", "bits.bnb_4bit_quant_type", "nf4"),
    ("compute float16", "bits.bnb_4bit_compute_dtype", FP16),
    ("mixed precision goes with it", "arguments.fp16", True),
    ("no nested quantization", "bits.bnb_4bit_use_double_quant", False),
    ("LoRA r", "lora.r", 64),
    ("LoRA alpha", "lora.lora_alpha", 16),
    ("LoRA dropout", "lora.lora_dropout", 0.1),
    ("LoRA default targets", "lora.target_modules", None),
    ("LoRA bias", "lora.bias", "none"),
    ("one epoch", "arguments.max_steps", 250),
    ("micro batch", "arguments.per_device_train_batch_size", 4),
    ("evaluation's micro batch", "arguments.per_device_eval_batch_size", 4),
    ("accumulation", "arguments.gradient_accumulation_steps", 1),
    ("gradient checkpointing", "plan.checkpointing", "full"),
    ("max grad norm", "arguments.max_grad_norm", 0.3),
    ("learning rate", "arguments.learning_rate", 1e-5),
    ("weight decay", "arguments.weight_decay", 0.001),
    ("paged 32-bit AdamW", "arguments.optim", "paged_adamw_32bit"),
    ("cosine", "arguments.lr_scheduler_type", "cosine"),
    ("warm-up 3 %", "arguments.warmup_steps", 8),
    ("group by length", "arguments.train_sampling_strategy", "group_by_length"),
    ("save steps 0", "arguments.save_strategy", "no"),
    ("log every 100", "arguments.logging_steps", 100),
    ("no packing", "spec.training.packing", False),
    ("max length: TRL's default", "spec.training.max_sequence_length", 1024),
    ("merged", "spec.merge.enabled", True),
    ("into float16", "spec.merge.dtype", "float16"),
    (
        "generation after the merge",
        "spec.evaluation.prompts",
        (
            "A woman is walking across the street eating a banana.",
            "Two young boys are playing football in the park.",
        ),
    ),
]
R2: list[Row] = [
    ("base model", "spec.model.uri", "hf://Qwen/Qwen2-7B"),
    ("nf4", "bits.bnb_4bit_quant_type", "nf4"),
    ("double quantization", "bits.bnb_4bit_use_double_quant", True),
    ("compute float16", "bits.bnb_4bit_compute_dtype", FP16),
    ("LoRA r", "lora.r", 16),
    ("LoRA alpha", "lora.lora_alpha", 32),
    ("LoRA dropout", "lora.lora_dropout", 0.05),
    (
        "LoRA targets",
        "lora.target_modules",
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    ("data: a local JSON file", "spec.dataset.uri", "pvc://training-data/instructions.json"),
    ("instruction, input and output", "spec.dataset.format", "instruction"),
    ("3 epochs", "arguments.max_steps", 189),
    ("micro batch", "arguments.per_device_train_batch_size", 4),
    ("accumulation", "arguments.gradient_accumulation_steps", 4),
    ("learning rate", "arguments.learning_rate", 2e-4),
    ("fp16", "arguments.fp16", True),
    ("paged 8-bit AdamW", "arguments.optim", "paged_adamw_8bit"),
    ("cosine", "arguments.lr_scheduler_type", "cosine"),
    ("warm-up 10 %", "arguments.warmup_steps", 19),
    ("gradient checkpointing", "plan.checkpointing", "full"),
    ("log every 10", "arguments.logging_steps", 10),
    ("save every 100", "arguments.save_steps", 100),
    ("keep 3 checkpoints", "spec.training.save_total_limit", 3),
    ("max length", "spec.training.max_sequence_length", 512),
    ("Chinese headings", "spec.dataset.template", "alpaca-zh"),
    ("merged", "spec.merge.enabled", True),
    ("into float16", "spec.merge.dtype", "float16"),
    ("GGUF", "spec.merge.gguf.quantization", "q4_k_m"),
]
R3: list[Row] = [
    ("base model", "spec.model.uri", "hf://nvidia/Llama3-ChatQA-1.5-8B"),
    ("dataset", "spec.dataset.uri", "hf://mlabonne/guanaco-llama2-1k"),
    ("split", "spec.dataset.split", "train"),
    ("column", "spec.dataset.columns.text", "text"),
    ("nf4", "bits.bnb_4bit_quant_type", "nf4"),
    ("compute float16, bfloat16 from capability 8", "bits.bnb_4bit_compute_dtype", OnEach((BF16, FP16))),
    ("mixed precision goes with it: bf16", "arguments.bf16", OnEach((True, False))),
    ("mixed precision goes with it: fp16", "arguments.fp16", OnEach((False, True))),
    ("no nested quantization", "bits.bnb_4bit_use_double_quant", False),
    ("LoRA r", "lora.r", 64),
    ("LoRA alpha", "lora.lora_alpha", 16),
    ("LoRA dropout", "lora.lora_dropout", 0.1),
    ("LoRA default targets", "lora.target_modules", None),
    ("10 epochs", "arguments.max_steps", 2500),
    ("micro batch", "arguments.per_device_train_batch_size", 4),
    ("accumulation", "arguments.gradient_accumulation_steps", 1),
    ("gradient checkpointing", "plan.checkpointing", "full"),
    ("max grad norm", "arguments.max_grad_norm", 0.3),
    ("learning rate", "arguments.learning_rate", 2e-4),
    ("weight decay", "arguments.weight_decay", 0.001),
    ("paged 32-bit AdamW", "arguments.optim", "paged_adamw_32bit"),
    ("cosine", "arguments.lr_scheduler_type", "cosine"),
    ("warm-up 3 %", "arguments.warmup_steps", 75),
    ("group by length", "arguments.train_sampling_strategy", "group_by_length"),
    ("save steps 0", "arguments.save_strategy", "no"),
    ("log every 25", "arguments.logging_steps", 25),
    ("no packing", "spec.training.packing", False),
]
R4: list[Row] = [
    ("base model", "spec.model.uri", "hf://THUDM/chatglm2-6b"),
    ("remote code", "spec.model.trust_remote_code", True),
    ("nf4", "bits.bnb_4bit_quant_type", "nf4"),
    ("double quantization", "bits.bnb_4bit_use_double_quant", True),
    ("compute dtype, configurable", "bits.bnb_4bit_compute_dtype", FP16),
    ("mixed precision goes with it", "arguments.fp16", True),
    ("rank, configurable", "lora.r", 8),
    ("LoRA targets: PEFT's for chatglm", "lora.target_modules", None),
    ("training rows as a file", "spec.dataset.uri", "pvc://knowledge-base/train.json"),
    ("validation rows as a file", "spec.dataset.validation.uri", "pvc://knowledge-base/validation.json"),
    ("duplicates", "spec.dataset.deduplicate", True),
    ("maximum length", "spec.training.max_sequence_length", 512),
    ("evaluation during training", "arguments.eval_strategy", "steps"),
    ("… with every checkpoint", "arguments.eval_steps", 100),
    ("checkpoints to resume from", "arguments.save_steps", 100),
    ("the same prompts answered by both", "spec.evaluation.prompts", ("公司的年假制度", "报销流程")),
]
TABLES = dict(zip(CONFIGS, (R0, R1, R2, R3, R4), strict=True))


@pytest.mark.parametrize("with_bf16", [True, False], ids=["bf16 GPU", "fp16 GPU"])
@pytest.mark.parametrize(
    ("recipe", "row"), [pytest.param(name, row, id=f"{name[:2]} {row[0]}") for name in TABLES for row in TABLES[name]]
)
def test_a_setting_reaches_the_library(recipe: str, row: Row, with_bf16: bool) -> None:
    _, path, expected = row
    built = build(recipe, BF16_GPU if with_bf16 else FP16_GPU)
    if isinstance(expected, OnEach):
        expected = expected[0 if with_bf16 else 1]
    assert built.value(path) == expected


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("r1-llama-2-7b-contradictions", {"q_proj", "v_proj"}),
        ("r3-llama3-chatqa-8b-guanaco", {"q_proj", "v_proj"}),
        ("r4-chatglm2-6b-knowledge-base", {"query_key_value"}),
    ],
)
def test_default_targets_are_peft_s_for_the_family(recipe: str, layers: set[str]) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as BY_FAMILY

    assert set(BY_FAMILY[facts_of(recipe).model_type]) == layers


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("r0-gpt-neox-20b-quotes", 8_650_752), ("r1-llama-2-7b-contradictions", 33_554_432)],
)
def test_the_adapter_has_as_many_weights_as_the_recipe_says(recipe: str, parameters: int) -> None:
    """R0: "about 8 M". Counted on the real architecture, without memory for its weights."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[recipe])
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), build(recipe, BF16_GPU).lora)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == parameters


@pytest.mark.parametrize(
    ("recipe", "gpu"),
    [
        ("r0-gpt-neox-20b-quotes", "T4"),
        ("r1-llama-2-7b-contradictions", "T4"),
        ("r2-qwen2-7b-instructions", "RTX-3060"),
        ("r2-qwen2-7b-instructions", "RTX-4090"),
        ("r3-llama3-chatqa-8b-guanaco", "T4"),
        ("r4-chatglm2-6b-knowledge-base", "RTX-2080-Ti"),
    ],
)
def test_a_recipe_fits_the_gpu_it_ran_on(recipe: str, gpu: str) -> None:
    planned = planned_on(recipe, gpu_class(gpu))
    assert isinstance(planned, Plan), planned


@pytest.mark.parametrize("example", [*CONFIGS, *OTHERS])
def test_every_example_gets_a_plan(example: str) -> None:
    planned = planned_on(example, *SHIPPED)
    assert isinstance(planned, Plan), planned


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Job:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"quote " * length}"}}\n' for length in range(1, 9)))
    job = Job(tmp_path, tiny_llama, rows)
    return job.change(dataset={"template": None, "validation": None})


def test_r1_the_tokenizer_pads_on_the_right_with_the_end_of_text(job: Job, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama, job.settings())
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tokenizer.eos_token, "right")


def test_r1_the_model_has_no_cache_and_no_tensor_parallelism(job: Job, tiny_llama: Path) -> None:
    hardware = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
    model = load_quantized(tiny_llama, job.settings(), hardware)
    assert (model.config.use_cache, model.config.pretraining_tp) == (False, 1)


def test_r2_s_alternative_reaches_unsloth(job: Job, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same manifest with another backend and length. Unsloth itself isn't here; what it is called with is."""
    wire = spec_of("r2-qwen2-7b-instructions").to_wire()
    training = wire["training"] | {"backend": "unsloth", "maxSequenceLength": 2048, "maxSteps": None}
    job.change(lora=wire["lora"], quantization=wire["quantization"], training=training)
    called: dict[str, dict[str, Any]] = {}
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    fast = SimpleNamespace(
        from_pretrained=lambda folder, **options: (called.update(base=options) or model, None),
        get_peft_model=lambda model, **options: called.update(adapter=options),
    )
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=fast))
    monkeypatch.setattr("qlora_trainer.model.require_quantized_layers", lambda model: None)
    settings, hardware = job.settings(), Hardware("cuda", NumberTypes("float16", "fp16"), "paged_adamw_8bit")
    alternative = with_field(spec_of("r2-qwen2-7b-instructions"), "training.backend", "unsloth")
    planned = plan(alternative, facts_of("r2-qwen2-7b-instructions"), [gpu_class(FP16_GPU)])
    assert isinstance(planned, Plan)
    unsloth_backend.load(tiny_llama, load_tokenizer(tiny_llama, settings), settings, planned, hardware)
    base, adapter = called["base"], called["adapter"]
    assert (base["load_in_4bit"], base["dtype"], base["max_seq_length"]) == (True, FP16, 2048)
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], adapter["bias"]) == (16, 32, 0.05, "none")
    assert set(adapter["target_modules"]) == build("r2-qwen2-7b-instructions", FP16_GPU).value("lora.target_modules")
    # Its own gradient checkpointing, as the table has it, is called by its name.
    assert base["use_gradient_checkpointing"] == adapter["use_gradient_checkpointing"] == "unsloth"


@pytest.mark.parametrize("recipe", TABLES)
def test_rows_are_padded_by_position_and_never_packed(job: Job, recipe: str, tiny_llama: Path) -> None:
    """The collator of the trainer that the recipe's settings make. Padding is masked although it is the end of text."""
    training = spec_of(recipe).to_wire()["training"] | {"maxSteps": 1, "epochs": None, "microBatchSize": "auto"}
    job.change(training=training)
    settings = job.settings()
    hardware = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
    tokenizer = load_tokenizer(tiny_llama, settings)
    model = add_adapter(load_quantized(tiny_llama, settings, hardware), LoraSpec())
    plan_ = settings.config.plan
    assert plan_ is not None
    trainer = make_trainer(
        settings.spec, plan_, hardware, model=model, tokenizer=tokenizer, data=load_data(settings, tokenizer),
        total_steps=1, folder=job.folder, callbacks=[],
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[7]])
    end = tokenizer.eos_token_id
    real = batch["attention_mask"][0].sum()
    assert batch["input_ids"][0, real - 1] == batch["labels"][0, real - 1] == end
    assert set(batch["input_ids"][0, real:].tolist()) == {end}
    assert set(batch["labels"][0, real:].tolist()) == {IGNORED}
