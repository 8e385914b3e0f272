"""In which number types a run computes: trainer and memory model must agree on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qlorajob.spec import QLoRAJobSpec

ComputeType = Literal["bfloat16", "float16", "float32"]
Precision = Literal["bf16", "fp16", "fp32"]

PRECISION: Final[dict[ComputeType, Precision]] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
COMPUTE: Final[dict[Precision, ComputeType]] = {short: long for long, short in PRECISION.items()}

LACKING: Final[dict[tuple[ComputeType, ComputeType], str]] = {
    ("bfloat16", "float16"): "this GPU has no bfloat16",
    ("float16", "float32"): "the CPU has no fast float16",
}
"""What a machine can't do, or not in good time, by what is wanted and its best type: it takes its best type then."""


@dataclass(frozen=True, slots=True)
class NumberTypes:
    """What a run computes in. `degradations` say where the manifest asked for what the machine hasn't."""

    compute: ComputeType
    """Of the frozen model's products."""
    precision: Precision
    """Of mixed precision, in which the adapter computes; fp32 is none."""
    degradations: tuple[str, ...] = ()

    @property
    def differ(self) -> bool:
        """Every product's operands are rounded from one type to the other first."""
        return self.precision not in ("fp32", PRECISION[self.compute])

    @property
    def narrow(self) -> bool:
        """Everything computes in one 16-bit type."""
        return self.precision != "fp32" and not self.differ


def number_types(spec: QLoRAJobSpec, best: ComputeType) -> NumberTypes:
    """What `spec` means on a machine whose best type is `best`: float16 for a GPU without bfloat16, float32 for a CPU.

    Where only one of quantization.computeDtype and training.precision is set, the other follows it on a GPU.
    """
    compute, precision = spec.quantization.compute_dtype, spec.training.precision
    wanted = None if compute == "auto" else compute
    mixed = None if precision == "auto" else COMPUTE[precision]
    follows = best != "float32"
    products = _at_hand(wanted or (mixed if follows and mixed != "float32" else None) or best, best)
    rounded = _at_hand(mixed or (products if follows else "float32"), best)
    degradations = []
    if wanted and products != wanted:
        degradations.append(f"quantization.computeDtype {compute} runs as {products}: {LACKING[wanted, best]}")
    if mixed and rounded != mixed:
        degradations.append(f"training.precision {precision} runs as {PRECISION[rounded]}: {LACKING[mixed, best]}")
    return NumberTypes(products, PRECISION[rounded], tuple(degradations))


def _at_hand(wanted: ComputeType, best: ComputeType) -> ComputeType:
    return best if (wanted, best) in LACKING else wanted
