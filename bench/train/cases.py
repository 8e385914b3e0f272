"""What is measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench import inputs

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Case:
    """One setting. `checkpointing`, `layers`, `offload` and `cached` are the plan of this project's trainer."""

    name: str
    shape: str
    rows: int
    length: int
    rank: int = 16
    targets: tuple[str, ...] = ALL
    """As they are called in Llama; `Shape.named` has the family's own names."""
    dropout: float = 0.0
    optimizer: str = "paged_adamw_8bit"
    double_quant: bool = True
    checkpointing: str = "full"
    layers: int = 0
    offload: bool = False
    cached: bool = False
    """Weights are there in 16 bit too."""
    mean_length: int = 0
    """Rows of log-normal lengths with this mean, cut at `length`; 0: all of `length`."""

    def lengths(self, rows: int) -> list[int]:
        """Tokens of each row. The same for every variant."""
        if not self.mean_length:
            return [self.length] * rows
        spread = 0.8
        draw = np.random.default_rng(0).lognormal(math.log(self.mean_length) - spread**2 / 2, spread, rows)
        return [int(min(self.length, max(8, value))) for value in draw]


_8B = Case("8b", "llama-3-8b", 4, 2048)
_R1 = Case(
    "r1", "llama-2-7b", 4, 1024, rank=64, targets=("q_proj", "v_proj"), dropout=0.1,
    optimizer="paged_adamw_32bit", double_quant=False,
)  # fmt: skip
_R2 = Case("r2", "qwen2-7b", 4, 512, dropout=0.05)
_7B = Case("7b-512", "llama-2-7b", 1, 512)
_QWEN3, _PHI4 = Case("qwen3", "qwen3-8b", 4, 2048), Case("phi4", "phi-4", 4, 2048)
_REAL = Case("8b-real", "llama-3-8b", 4, 2048, mean_length=250)


def _auto(case: Case, *, cached: bool = True) -> Case:
    return replace(case, name=f"{case.name}-auto", checkpointing="none", cached=cached)


def _uncached(case: Case) -> Case:
    return replace(case, name=f"{case.name}-uncached", checkpointing="none")


def _offloaded(case: Case) -> Case:
    return replace(case, name=f"{case.name}-offload", offload=True)


CASES = {
    case.name: case
    for case in (
        _8B, _offloaded(_8B), _auto(_8B), _R1, _offloaded(_R1), _auto(_R1), _R2, _auto(_R2), _7B, _auto(_7B),
        _uncached(_8B), _uncached(_R1), _uncached(_R2), _uncached(_7B), _REAL, _auto(_REAL),
        _QWEN3, _offloaded(_QWEN3), _auto(_QWEN3), _PHI4, _auto(_PHI4, cached=False),
        Case("13b-512", "llama-2-13b", 1, 512), Case("70b-512", "llama-2-70b", 1, 512),
        Case("8b-100k", "llama-3-8b", 1, 102_400, rank=32, offload=True),
        Case("8b-131k", "llama-3-8b", 1, 131_072, rank=32, offload=True),
        Case("8b-160k", "llama-3-8b", 1, 163_840, rank=32, offload=True),
        Case("tiny", "tiny", 2, 128, dropout=0.05), Case("tiny-real", "tiny-qwen2", 2, 256, mean_length=40),
        Case("tiny-qwen3", "tiny-qwen3", 2, 128), Case("tiny-phi3", "tiny-phi3", 2, 128),
    )
}  # fmt: skip
"""By name. An `-auto` case is what a plan for 80 GB says: no checkpointing, weights in 16 bit too where they fit.
`-uncached` is without those. Cases of a family share their baselines."""


def baseline(case: Case) -> Case:
    """The case that reference and Unsloth run for it: they have one policy."""
    return CASES[re.sub("-(auto|uncached|offload)$", "", case.name)]


def corpus(case: Case, rows: int, vocabulary: int) -> list[dict[str, Any]]:
    """The case's rows, as random token ids and labels."""
    return inputs.rows(case.lengths(rows), vocabulary)
