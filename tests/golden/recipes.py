"""What each recipe's manifest turns into, made by the trainer's own functions, without weights and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.manifests import load_manifest
from qlora_trainer.corpus import Corpus
from qlora_trainer.data import TrainingData
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import lora_config, quantization_config
from qlora_trainer.training import _arguments
from qlora_vram.facts import model_facts
from qlora_vram.gpus import SHIPPED, GpuClass
from qlora_vram.outcome import DoesNotFit
from qlora_vram.planner import plan
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import DataSummary

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS: dict[str, dict[str, Any]] = {
    "r0-gpt-neox-20b-quotes": {
        "model_type": "gpt_neox", "num_hidden_layers": 44, "hidden_size": 6144, "intermediate_size": 24576,
        "num_attention_heads": 64, "vocab_size": 50432, "tie_word_embeddings": False,
    },
    "r1-llama-2-7b-contradictions": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "r2-qwen2-7b-instructions": {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "r3-llama3-chatqa-8b-guanaco": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "r4-chatglm2-6b-knowledge-base": {
        "model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696,
        "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128,
        "padded_vocab_size": 65024, "add_qkv_bias": True, "rmsnorm": True,
    },
}  # fmt: skip
"""The part of each published config.json that decides about names and shapes."""
_QWEN2_7B = CONFIGS["r2-qwen2-7b-instructions"]
OTHERS: dict[str, dict[str, Any]] = {
    "least": _QWEN2_7B,
    "chat": _QWEN2_7B,
    "gitops-retraining": _QWEN2_7B,
    "gated-model": CONFIGS["r3-llama3-chatqa-8b-guanaco"],
    "private-s3": {**CONFIGS["r3-llama3-chatqa-8b-guanaco"], "model_type": "mistral", "vocab_size": 32000},
}
"""Models of the small examples: Qwen2.5-7B, Llama-3.1-8B and Mistral-7B have these shapes."""

BF16_GPU, FP16_GPU = "A100-80GB", "Quadro-RTX-8000"
"""A GPU with bfloat16, and a Turing one without it (as the recipes' T4 and RTX 2080 Ti)."""
CAPABILITIES = {BF16_GPU: (8, 0), FP16_GPU: (7, 5)}
ROWS = 1000
"""Training rows, for counting steps."""


@dataclass(frozen=True, slots=True)
class Built:
    """A recipe as the trainer hands it to Hugging Face's libraries, on one GPU."""

    spec: QLoRAJobSpec
    plan: Plan
    hardware: Hardware
    bits: Any
    """BitsAndBytesConfig."""
    lora: Any
    """LoraConfig."""
    arguments: Any
    """SFTConfig."""

    def value(self, path: str) -> Any:
        """The value at a dotted path, words instead of enums."""
        found = attrgetter(path)(self)
        return found.value if isinstance(found, Enum) else found


def spec_of(recipe: str) -> QLoRAJobSpec:
    return load_manifest(EXAMPLES / f"{recipe}.yaml").spec


def facts_of(recipe: str) -> ModelFacts:
    found = model_facts((CONFIGS | OTHERS)[recipe])
    assert found is not None, f"the architecture of {recipe} isn't known"
    return found.model_copy(update={"weight_bytes": 2 * found.parameters})


def planned_on(recipe: str, *gpus: GpuClass) -> Plan | DoesNotFit:
    return plan(spec_of(recipe), facts_of(recipe), gpus)


def gpu_class(name: str) -> GpuClass:
    return next(known for known in SHIPPED if known.name == name)


@cache
def build(recipe: str, gpu: str) -> Built:
    """Plan and set up a recipe on a GPU class."""
    spec = spec_of(recipe)
    planned = planned_on(recipe, gpu_class(gpu))
    assert isinstance(planned, Plan), planned
    with pytest.MonkeyPatch.context() as machine:  # this one has no GPU
        machine.setattr("torch.cuda.is_available", lambda: True)
        machine.setattr("torch.cuda.get_device_capability", lambda: CAPABILITIES[gpu])
        hardware = Hardware.choose(spec, planned)
    with pytest.MonkeyPatch.context() as machine:
        machine.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        arguments = _arguments(spec, planned, hardware, steps(spec), Path("/tmp/recipe"), evaluates=True)
    return Built(
        spec=spec,
        plan=planned,
        hardware=hardware,
        bits=quantization_config(spec.quantization, hardware),
        lora=lora_config(spec.lora),
        arguments=arguments,
    )


def steps(spec: QLoRAJobSpec) -> int:
    """Optimizer steps for ROWS rows that aren't packed."""
    corpus = Corpus([], [[number] for number in range(ROWS)])
    data = TrainingData(corpus, None, encoder=None, digest="", summary=DataSummary(read_rows=ROWS))  # type: ignore[arg-type]
    return data.total_steps(spec)
