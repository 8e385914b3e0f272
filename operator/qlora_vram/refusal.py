"""Why nothing fits, and which changes would do. Every change that is named was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from qlora_vram import words
from qlora_vram.calibration import Calibration
from qlora_vram.changes import with_field
from qlora_vram.cuts import Cutter, Option, options, several_gpus
from qlora_vram.gpus import GpuClass
from qlora_vram.observations import Observations
from qlora_vram.outcome import DoesNotFit, Suggestion
from qlora_vram.workload import LENGTH_MULTIPLE
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts
from qlorajob.spec import QLoRAJobSpec

MAX_MESSAGE: Final = 1024
MAX_SUGGESTIONS: Final = 4

Fits = Callable[[QLoRAJobSpec], Option | None]
"""The planner: the option that holds a job."""


def unknown_class(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> DoesNotFit:
    """The class that the spec names isn't one of those that there are."""
    known = ", ".join(gpu.name for gpu in classes)
    message = f"there is no GPU class {spec.resources.gpu_class}; this operator knows cpu, {known}"
    return DoesNotFit(Reason.UNSUPPORTED, _short(message), "resources.gpuClass")


def refusal(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass],
    fits: Fits,
    calibration: Calibration | None,
    observations: Observations | None = None,
) -> DoesNotFit:
    """Nothing fits: by how much, and the nearest changes after which something does."""
    allowed = options(spec, classes)
    suggestions = tuple(_suggestions(spec, fits))[:MAX_SUGGESTIONS]
    if not allowed:
        message = "no GPU class can give so many GPUs to one pod" if classes else "this cluster has no GPU"
        return DoesNotFit(Reason.DOES_NOT_FIT, _short(message), "resources.gpus", suggestions)
    largest = max(allowed, key=lambda option: option.gpu.memory_mib)
    message = f"{_need(Cutter(spec, facts, largest, calibration, observations))}: {_advice(spec, suggestions)}"
    return DoesNotFit(Reason.DOES_NOT_FIT, _short(message), "resources.gpuClass", suggestions)


def _need(cutter: Cutter) -> str:
    """What the job takes at least, and what there is."""
    spec, largest, cut = cutter.spec, cutter.option, cutter.smallest()
    if cut is None:
        return f"training.globalBatchSize {spec.training.global_batch_size} can't be divided over {largest.gpus} GPUs"
    which = "" if spec.resources.gpu_class != "auto" else ", the largest class,"
    return (
        f"{words.count(cutter.facts.parameters)} parameters with {words.rows(cut.shape.rows, cut.length)} "
        f"{words.checkpointing(cut)} need about {words.gigabytes(cutter.predicted(cut))} of GPU memory; "
        f"{largest.gpu.name}{which} has {words.gigabytes(cutter.usable)} usable"
    )


def _advice(spec: QLoRAJobSpec, suggestions: Sequence[Suggestion]) -> str:
    if not suggestions:
        return "no single change of length, micro batch, rank or class would do; choose a smaller model"
    return "it would fit with " + ", or ".join(_said(spec, each) for each in suggestions)


def _said(spec: QLoRAJobSpec, suggestion: Suggestion) -> str:
    value = str(suggestion.value).lower() if isinstance(suggestion.value, bool) else suggestion.value
    # What the user wrote already, or leaves to the planner, needs no name of a class.
    where = f" ({suggestion.gpu_class})" if suggestion.field == "resources.gpuClass" else ""
    return f"{suggestion.field}: {value}{where}"


def _suggestions(spec: QLoRAJobSpec, fits: Fits) -> Iterator[Suggestion]:
    """Changes that cost nothing first, then those that change the result, the smallest that do."""
    for field, value in (*_free(spec), *_bigger(spec)):
        yield from _tried(spec, field, value, fits)
    yield from _largest(spec, "training.maxSequenceLength", _lengths(spec), fits)
    yield from _largest(spec, "lora.rank", _halves(spec.lora.rank), fits)


def _free(spec: QLoRAJobSpec) -> Iterator[tuple[str, Any]]:
    """Settings that don't change the result."""
    if spec.training.gradient_checkpointing is False:
        yield "training.gradientCheckpointing", "auto"
    if isinstance(spec.training.micro_batch_size, int) and spec.training.micro_batch_size > 1:
        yield "training.microBatchSize", "auto"


def _bigger(spec: QLoRAJobSpec) -> Iterator[tuple[str, Any]]:
    if spec.resources.gpu_class != "auto":
        yield "resources.gpuClass", "auto"
    if spec.resources.gpus == 1 and several_gpus():
        yield "resources.gpus", "auto"


def _lengths(spec: QLoRAJobSpec) -> list[int]:
    """Shorter rows, ascending."""
    return list(range(LENGTH_MULTIPLE, spec.training.max_sequence_length, LENGTH_MULTIPLE))


def _halves(rank: int) -> list[int]:
    return sorted(rank >> shift for shift in range(1, rank.bit_length()))


def _tried(spec: QLoRAJobSpec, field: str, value: Any, fits: Fits) -> Iterator[Suggestion]:
    found = fits(with_field(spec, field, value))
    if found is not None:
        yield Suggestion(field, value, found.gpu.name)


def _largest(spec: QLoRAJobSpec, field: str, values: Sequence[Any], fits: Fits) -> Iterator[Suggestion]:
    """The largest of ascending values that fits, by bisection: memory grows with each of them."""
    low, high, best = 0, len(values), None
    while low < high:
        middle = (low + high) // 2
        found = fits(with_field(spec, field, values[middle]))
        if found is None:
            high = middle
        else:
            low, best = middle + 1, Suggestion(field, values[middle], found.gpu.name)
    if best is not None:
        yield best


def _short(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
