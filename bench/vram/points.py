"""What is measured: models from 0.1B to 70B, each way of cutting a run, each component of the memory model in turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_vram.catalog import find
from qlora_vram.facts import model_facts
from qlora_vram.fast import LOGIT_BYTES, LOGIT_ROWS
from qlora_vram.gpus import SHIPPED
from qlora_vram.workload import Shape, Workload, workload
from qlorajob.plan import ModelFacts
from qlorajob.spec import QLoRAJobSpec

CODE = 3
"""Raised when the trainer's memory changes, so that what was measured before isn't taken for what is now. 2: the fast
path's loss holds one chunk of logits instead of two. 3: families in `NEWLY_FAST` take the fast path."""
NEWLY_FAST = frozenset({"phi3", "qwen3"})
GPU = next(gpu for gpu in SHIPPED if gpu.name == "H100")


@dataclass(frozen=True, slots=True)
class Point:
    """One run. Everything that isn't here is the manifest's default."""

    model: str
    """Name in the catalogue."""
    rows: int
    """Micro batch."""
    length: int
    checkpointed: int = 1000
    """Layers, from the first; more than there are: all."""
    offload: bool = False
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    optimizer: str = "paged_adamw_8bit"
    packing: bool = False
    double_quant: bool = True
    accumulation: int = 2
    cached: bool = False
    """Weights are there in 16 bit too."""

    def spec(self, steps: int) -> QLoRAJobSpec:
        """The manifest's spec."""
        return QLoRAJobSpec.model_validate(
            {
                "model": {"uri": f"hf://{self.model}"},
                "dataset": {"uri": "hf://bench/random"},
                "quantization": {"doubleQuant": self.double_quant},
                "lora": {
                    "rank": self.rank,
                    "alpha": self.rank,
                    "dropout": self.dropout,
                    "targetModules": self.targets if isinstance(self.targets, str) else list(self.targets),
                },
                "training": {
                    "maxSteps": steps,
                    "globalBatchSize": self.rows * self.accumulation,
                    "microBatchSize": self.rows,
                    "maxSequenceLength": self.length,
                    "packing": self.packing,
                    "optimizer": self.optimizer,
                    "loggingSteps": steps,
                    "saveSteps": 0,
                },
                "output": {"uri": "s3://bench/random"},
            }
        )

    @property
    def config(self) -> dict[str, Any]:
        """The essential part of the model's config.json."""
        entry = find(self.model)
        if entry is None:
            raise LookupError(f"{self.model} isn't in the catalogue")
        return dict(entry.config)

    @property
    def facts(self) -> ModelFacts:
        """Of the model."""
        facts = model_facts(self.config)
        assert facts is not None  # noqa: S101 (all of the catalogue is known)
        return facts

    def workload(self) -> Workload:
        """What the memory model is asked about: all rows are of one length."""
        facts = self.facts
        shape = Shape(self.rows, min(self.checkpointed, facts.layers), offload=self.offload, cached=self.cached)
        return replace(workload(self.spec(3), facts, GPU, shape, self.accumulation), changing=False)

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Point:
        """As it was written down."""
        targets = found["targets"]
        return cls(**{**found, "targets": targets if isinstance(targets, str) else tuple(targets)})


QV = ("q_proj", "v_proj")
SMOL, QWEN_HALF, LLAMA_1B = "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2-0.5B", "meta-llama/Llama-3.2-1B"
LLAMA_3B, LLAMA2_7B, LLAMA3_8B = "meta-llama/Llama-3.2-3B", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
QWEN_7B, MISTRAL, LLAMA2_13B = "Qwen/Qwen2-7B", "mistralai/Mistral-7B-v0.3", "meta-llama/Llama-2-13b-hf"
LLAMA2_70B, QWEN_72B, QWEN_32B = "meta-llama/Llama-2-70b-hf", "Qwen/Qwen2-72B", "Qwen/Qwen2.5-32B"
NEOX, GEMMA2, PHI3 = "EleutherAI/gpt-neox-20b", "google/gemma-2-9b", "microsoft/Phi-3-mini-4k-instruct"
PHI4 = "microsoft/phi-4"
QWEN3, FALCON, SMOL_BIG = "Qwen/Qwen3-8B", "tiiuae/falcon-7b", "HuggingFaceTB/SmolLM2-1.7B"

POINTS = (
    # Size, at R2's setting
    Point(SMOL, 1, 512),
    Point(QWEN_HALF, 1, 512),
    Point(LLAMA_1B, 1, 512),
    Point(LLAMA_3B, 1, 512),
    Point(LLAMA2_7B, 1, 512),
    Point(LLAMA2_13B, 1, 512),
    Point(QWEN_32B, 1, 512),
    Point(LLAMA2_70B, 1, 512),
    Point(QWEN_72B, 1, 512),
    # Tokens: rows and length
    Point(SMOL, 16, 1024),
    Point(LLAMA_1B, 8, 2048),
    Point(LLAMA3_8B, 4, 2048),
    Point(LLAMA3_8B, 1, 8192),
    Point(LLAMA3_8B, 1, 32768),
    Point(LLAMA2_7B, 4, 1024),
    Point(LLAMA2_13B, 2, 4096),
    Point(LLAMA2_70B, 1, 2048),
    Point(QWEN_7B, 4, 512, dropout=0.05),
    Point(MISTRAL, 2, 4096, packing=True),
    # How many layers compute again
    Point(SMOL_BIG, 2, 1024, checkpointed=0),
    Point(LLAMA_3B, 2, 1024, checkpointed=14),
    Point(LLAMA2_7B, 1, 512, checkpointed=0),
    Point(LLAMA3_8B, 2, 2048, checkpointed=0),
    Point(LLAMA3_8B, 4, 2048, checkpointed=16),
    Point(QWEN_7B, 4, 512, checkpointed=0),
    Point(LLAMA3_8B, 1, 16384, offload=True),
    Point(QWEN_7B, 2, 4096, offload=True),
    # Weights in 16 bit too
    Point(LLAMA2_7B, 1, 512, checkpointed=0, cached=True),
    Point(LLAMA3_8B, 4, 2048, checkpointed=0, cached=True),
    # Adapter and optimizer
    Point(LLAMA2_7B, 4, 1024, rank=64, targets=QV, dropout=0.1, optimizer="paged_adamw_32bit", double_quant=False),
    Point(LLAMA3_8B, 1, 1024, rank=256),
    Point(LLAMA3_8B, 1, 1024, rank=128, optimizer="adamw_torch"),
    Point(LLAMA2_7B, 2, 1024, rank=8, targets=QV, optimizer="adamw_8bit"),
    Point(LLAMA_3B, 4, 1024, packing=True, dropout=0.1),
    Point(QWEN_HALF, 8, 2048, packing=True),
    # Norms on each head
    Point(QWEN3, 1, 512),
    Point(QWEN3, 2, 2048, packing=True),
    Point(QWEN3, 4, 1024, checkpointed=18, dropout=0.05),
    # Fused products
    Point(PHI3, 4, 1024),
    Point(PHI3, 2, 1024, checkpointed=0),
    Point(PHI4, 1, 2048),
    # What goes through transformers' own layers
    Point(PHI3, 1, 4096),  # longer than its window
    Point(NEOX, 1, 512, rank=8, targets=("query_key_value",), dropout=0.05),
    Point(NEOX, 4, 1024),
    Point(GEMMA2, 1, 1024),
    Point(GEMMA2, 2, 2048, packing=True),
    Point(FALCON, 2, 1024),
    Point(FALCON, 4, 512, checkpointed=0, dropout=0.05),
)
"""What the constants are fitted to."""

HELD_OUT = (
    Point(LLAMA_1B, 4, 1024, checkpointed=8, dropout=0.05),
    Point(MISTRAL, 8, 512),
    Point(LLAMA2_13B, 4, 1024, rank=32, checkpointed=20),
    Point(QWEN_32B, 2, 2048, packing=True),
    Point(QWEN3, 8, 512, rank=32),
    Point(LLAMA3_8B, 2, 4096, offload=True, rank=64),
)
"""What they are tried on."""


def outdated(workload: Workload, code: int) -> bool:
    """Whether the trainer's memory has changed since `code`, in a way that a run of this kind shows."""
    row = max(1, workload.facts.vocabulary * workload.compute_bytes)
    chunk = max(LOGIT_ROWS, LOGIT_BYTES // row // LOGIT_ROWS * LOGIT_ROWS)
    two_chunks = code < 2 and workload.engine == "fast" and workload.tokens > chunk
    return two_chunks or (code < 3 and workload.facts.model_type in NEWLY_FAST)
