"""In which number types a run computes: trainer and memory model must agree on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from qlorajob.spec import QLoRAJobSpec

ComputeType = Literal["bfloat16", "float16", "float32"]
Precision = Literal["bf16", "fp16", "fp32"]

PRECISION: Final[dict[ComputeType, Precision]] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
COMPUTE: Final[dict[Precision, ComputeType]] = {short: long for long, short in PRECISION.items()}


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
    degradations: list[str] = []
    wanted, mixed = spec.quantization.compute_dtype, spec.training.precision
    if wanted != "auto":
        compute = _compute(wanted, best, degradations)
    elif mixed in ("bf16", "fp16"):
        compute = _compute(COMPUTE[mixed], best, [])  # precision's own words say it
    else:
        compute = best
    if mixed != "auto":
        precision = _precision(mixed, best, degradations)
    else:
        precision = "fp32" if best == "float32" else PRECISION[compute]
    return NumberTypes(compute, precision, tuple(degradations))


def _compute(asked: ComputeType, best: ComputeType, degradations: list[str]) -> ComputeType:
    if (asked, best) == ("bfloat16", "float16"):
        degradations.append("quantization.computeDtype bfloat16 runs as float16: this GPU has no bfloat16")
        return best
    if (asked, best) == ("float16", "float32"):
        degradations.append("quantization.computeDtype float16 runs as float32: the CPU has no fast float16")
        return best
    return asked


def _precision(asked: Precision, best: ComputeType, degradations: list[str]) -> Precision:
    if (asked, best) == ("bf16", "float16"):
        degradations.append("training.precision bf16 runs as fp16: this GPU has no bfloat16")
        return "fp16"
    if (asked, best) == ("fp16", "float32"):
        degradations.append("training.precision fp16 runs as fp32: fp16 needs a GPU")
        return "fp32"
    return asked
