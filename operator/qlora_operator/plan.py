"""From a model's size to a GPU: estimate the peak, choose the class, the micro batch and the requests. Pure.

The estimate stands on R2's published table for QLoRA (a 7B model takes about 6 GB, 13B 10 GB, 70B 48 GB, at one row of
512 tokens), plus what more tokens cost. `estimate` is the part that a measured model of memory replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from qlora_operator.config import OperatorConfig
from qlora_vram.gpus import CPU, GIB, MIB, SHIPPED, GpuClass, by_size, usable_bytes
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan, Requests
from qlorajob.spec import QLoRAJobSpec

Checkpointing = Literal["none", "full"]

TABLE: Final = ((0.0, 0.8e9), (7e9, 6e9), (13e9, 10e9), (70e9, 48e9))
"""R2's QLoRA column: parameters → bytes. The first point is CUDA's workspaces and the allocator's slack."""
TABLE_TOKENS: Final = 512
"""Tokens in one micro batch that the table holds for."""
MAX_AUTO_MICRO_BATCH: Final = 8
"""More rows at once hardly train faster, and cost memory."""
MAX_AUTO_MICRO_BATCH_CPU: Final = 4
LAYER_BYTES_PER_TOKEN: Final = 34
"""16-bit activations that one decoder layer keeps for its backward pass, per token and hidden unit."""
LOGIT_BYTES: Final = 10
"""Per token and vocabulary entry: 16-bit logits, their float32 copy and its gradient."""
CPU_BASE_BYTES: Final = 3 * GIB // 2
"""Python with torch, transformers and datasets loaded."""


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """No plan, and why, in a sentence for the user."""

    reason: Reason
    message: str
    field: str


@dataclass(frozen=True, slots=True)
class Shape:
    """How a run is cut: what the peak depends on beside the model."""

    micro_batch: int
    checkpointing: Checkpointing


def plan(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass] = SHIPPED,
    config: OperatorConfig | None = None,
) -> Plan | DoesNotFit:
    """How to run `spec` on one GPU (or on CPU), or why that can't be. The global batch is kept exactly."""
    config = config or OperatorConfig()
    if spec.resources.gpu_class == CPU:
        return _plan_cpu(spec, facts, config)
    if spec.resources.gpus not in ("auto", 1):
        return DoesNotFit(
            Reason.UNSUPPORTED,
            f"{spec.resources.gpus} GPUs for one job aren't supported yet: leave it at auto and name a larger gpuClass",
            "resources.gpus",
        )
    candidates = by_size(classes)
    if spec.resources.gpu_class != "auto":
        candidates = tuple(gpu for gpu in candidates if gpu.name == spec.resources.gpu_class)
        if not candidates:
            known = ", ".join(gpu.name for gpu in by_size(classes))
            message = f"there is no GPU class {spec.resources.gpu_class}; this operator knows cpu, {known}"
            return DoesNotFit(Reason.UNSUPPORTED, message, "resources.gpuClass")
    smallest = min(_shapes(spec, MAX_AUTO_MICRO_BATCH), key=lambda shape: _peak(facts, spec, shape))
    need = _peak(facts, spec, smallest)
    for gpu in candidates:
        if need <= usable_bytes(gpu):
            return _plan_gpu(spec, facts, gpu, config)
    return _too_big(spec, candidates[-1], need, smallest)


def estimate(facts: ModelFacts, spec: QLoRAJobSpec, shape: Shape) -> dict[str, int]:
    """Peak GPU memory by component, in bytes."""
    extra = max(0, shape.micro_batch * spec.training.max_sequence_length - TABLE_TOKENS)
    kept = facts.layers * (2 if shape.checkpointing == "full" else LAYER_BYTES_PER_TOKEN)
    working = LAYER_BYTES_PER_TOKEN if shape.checkpointing == "full" else 0
    return {
        "base": int(_interpolate(facts.parameters)),
        "activations": extra * facts.hidden_size * (kept + working),
        "logits": extra * facts.vocabulary * LOGIT_BYTES,
    }


def estimate_cpu(facts: ModelFacts, spec: QLoRAJobSpec, shape: Shape) -> dict[str, int]:
    """Peak host memory by component: weights are read in 16 bit, then held in 4; activations are float32."""
    tokens = shape.micro_batch * spec.training.max_sequence_length
    kept = facts.layers * (2 if shape.checkpointing == "full" else LAYER_BYTES_PER_TOKEN)
    working = LAYER_BYTES_PER_TOKEN if shape.checkpointing == "full" else 0
    return {
        "base": CPU_BASE_BYTES,
        "weights": 3 * max(facts.weight_bytes, 2 * facts.parameters) // 2,
        "activations": 2 * tokens * facts.hidden_size * (kept + working),
        "logits": tokens * facts.vocabulary * 2 * LOGIT_BYTES,
    }


def merge_requests(spec: QLoRAJobSpec, facts: ModelFacts, config: OperatorConfig) -> Requests:
    """What merging takes: the 16-bit model in memory (the GGUF export holds it again), and on disk twice."""
    bytes_per_parameter = 4 if spec.merge.dtype == "float32" else 2
    merged = facts.parameters * bytes_per_parameter
    exports = 3 if spec.merge.gguf else 2
    return Requests(
        cpu=config.cpu_cpu_request,
        memory=_gibibytes(CPU_BASE_BYTES + GIB // 2 + exports * merged),
        ephemeral_storage=_gibibytes(2 * GIB + facts.weight_bytes + exports * merged),
    )


def _interpolate(parameters: int) -> float:
    """Piecewise linear through TABLE; beyond its end the last slope goes on."""
    for (x0, y0), (x1, y1) in pairwise(TABLE):
        if parameters <= x1 or x1 == TABLE[-1][0]:
            return y0 + (y1 - y0) * (parameters - x0) / (x1 - x0)
    raise AssertionError("unreachable")


def _peak(facts: ModelFacts, spec: QLoRAJobSpec, shape: Shape) -> int:
    return sum(estimate(facts, spec, shape).values())


def _shapes(spec: QLoRAJobSpec, max_micro_batch: int) -> Iterator[Shape]:
    """Allowed shapes, fastest first: more rows at once before less recomputation."""
    asked = spec.training.micro_batch_size
    sizes = [asked] if isinstance(asked, int) else list(_power_of_two_divisors(spec, max_micro_batch))
    for size in sorted(sizes, reverse=True):
        for checkpointing in _checkpointings(spec):
            yield Shape(size, checkpointing)


def _power_of_two_divisors(spec: QLoRAJobSpec, maximum: int) -> Iterator[int]:
    size = 1
    while size <= maximum and spec.training.global_batch_size % size == 0:
        yield size
        size *= 2


def _checkpointings(spec: QLoRAJobSpec) -> tuple[Checkpointing, ...]:
    """auto: every layer on a GPU, where memory costs more than time; on CPU only where memory is short."""
    asked = spec.training.gradient_checkpointing
    if isinstance(asked, bool):
        return ("full",) if asked else ("none",)
    return ("none", "full") if spec.resources.gpu_class == CPU else ("full",)


def _plan_gpu(spec: QLoRAJobSpec, facts: ModelFacts, gpu: GpuClass, config: OperatorConfig) -> Plan:
    usable = usable_bytes(gpu)
    shape = next(s for s in _shapes(spec, MAX_AUTO_MICRO_BATCH) if _peak(facts, spec, s) <= usable)
    breakdown = estimate(facts, spec, shape)
    peak = sum(breakdown.values())
    chosen = "is the smallest class that holds" if spec.resources.gpu_class == "auto" else "holds"
    reason = (
        f"{_billions(facts.parameters)} parameters in 4 bit with {_rows(shape, spec)} take about {_gb(peak)}: "
        f"{gpu.name} ({_gb(usable)} usable) {chosen} that"
    )
    downloads = 0 if spec.model.cache_claim else facts.weight_bytes
    return Plan(
        gpu_class=gpu.name,
        gpus=1,
        gpu_memory_mib=gpu.memory_mib,
        predicted_peak_bytes=peak,
        breakdown=breakdown,
        micro_batch_size=shape.micro_batch,
        gradient_accumulation=spec.training.global_batch_size // shape.micro_batch,
        checkpointing=shape.checkpointing,
        bf16=gpu.bf16,
        requests=Requests(
            cpu=_asked(spec.resources.cpu, config.gpu_cpu_request),
            memory=_asked(spec.resources.memory, _gibibytes(4 * GIB + min(facts.weight_bytes, 12 * GIB))),
            ephemeral_storage=_asked(spec.resources.ephemeral_storage, _gibibytes(6 * GIB + 5 * downloads // 4)),
        ),
        reason=reason,
    )


def _plan_cpu(spec: QLoRAJobSpec, facts: ModelFacts, config: OperatorConfig) -> Plan:
    def peak_of(shape: Shape) -> int:
        return sum(estimate_cpu(facts, spec, shape).values())

    shapes = list(_shapes(spec, MAX_AUTO_MICRO_BATCH_CPU))
    fitting = [shape for shape in shapes if peak_of(shape) <= config.cpu_memory_budget_bytes]
    shape = fitting[0] if fitting else min(shapes, key=peak_of)
    breakdown = estimate_cpu(facts, spec, shape)
    peak = sum(breakdown.values())
    return Plan(
        gpu_class=CPU,
        gpus=0,
        predicted_peak_bytes=peak,
        breakdown=breakdown,
        micro_batch_size=shape.micro_batch,
        gradient_accumulation=spec.training.global_batch_size // shape.micro_batch,
        checkpointing=shape.checkpointing,
        bf16=False,
        requests=Requests(
            cpu=_asked(spec.resources.cpu, config.cpu_cpu_request),
            memory=_asked(spec.resources.memory, _gibibytes(peak + peak // 4 + GIB // 2)),
            ephemeral_storage=_asked(
                spec.resources.ephemeral_storage, _gibibytes(2 * GIB + 5 * facts.weight_bytes // 4)
            ),
        ),
        reason=(
            f"gpuClass cpu asks for no GPU: {_billions(facts.parameters)} parameters with {_rows(shape, spec)} "
            f"take about {_gb(peak)} of memory"
        ),
    )


def _too_big(spec: QLoRAJobSpec, largest: GpuClass, need: int, shape: Shape) -> DoesNotFit:
    which = "" if spec.resources.gpu_class != "auto" else ", the largest known class,"
    hint = f"lower training.maxSequenceLength ({spec.training.max_sequence_length})"
    if isinstance(spec.training.micro_batch_size, int) and spec.training.micro_batch_size > 1:
        hint = f"leave training.microBatchSize ({spec.training.micro_batch_size}) at auto or {hint}"
    if spec.training.gradient_checkpointing is False:
        hint = f"leave training.gradientCheckpointing at auto or {hint}"
    if spec.resources.gpu_class != "auto":
        hint = f"leave resources.gpuClass at auto or {hint}"
    message = (
        f"training with {_rows(shape, spec)} needs about {_gb(need)} of GPU memory; {largest.name}{which} "
        f"has {_gb(usable_bytes(largest))} usable: {hint}"
    )
    return DoesNotFit(Reason.DOES_NOT_FIT, message, "resources.gpuClass")


def _asked(value: str, automatic: str) -> str:
    return automatic if value == "auto" else value


def _rows(shape: Shape, spec: QLoRAJobSpec) -> str:
    recompute = "with" if shape.checkpointing == "full" else "without"
    rows = "row" if shape.micro_batch == 1 else "rows"
    return f"{shape.micro_batch} {rows} of {spec.training.max_sequence_length} tokens {recompute} checkpointing"


def _gibibytes(size: int) -> str:
    """Rounded up to a half, so that the pod spec stays readable."""
    halves = math.ceil(size / (GIB // 2))
    return f"{halves // 2}Gi" if halves % 2 == 0 else f"{halves * 512 * MIB // MIB}Mi"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
