"""From a job and a model to a plan: the cheapest GPU that holds it, and the fastest way to use that. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_vram import words
from qlora_vram.calibration import Calibration
from qlora_vram.cpu import plan_cpu
from qlora_vram.cuts import Cutter, Option, options, several_gpus
from qlora_vram.gpus import CPU, SHIPPED, GpuClass
from qlora_vram.layers import detailed
from qlora_vram.observations import Observations
from qlora_vram.outcome import DoesNotFit
from qlora_vram.refusal import refusal, unknown_class
from qlora_vram.requests import Defaults, Settings, gpu_requests
from qlora_vram.workload import Workload
from qlorajob.errors import Reason
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec


def plan(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass] = SHIPPED,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    observations: Observations | None = None,
) -> Plan | DoesNotFit:
    """How to run `spec` on one GPU of these classes (or on CPU), or why that can't be.

    The cheapest class whose usable memory holds the job, cut as small as the spec allows; of equally cheap ones the
    smallest. On that class, the cut with the best predicted speed that fits. The global batch is kept exactly.
    `observations` of earlier runs correct what is predicted.
    """
    settings = settings or Defaults()
    if spec.resources.gpu_class == CPU:
        return plan_cpu(spec, facts, settings)
    wanted = spec.resources.gpus
    if wanted not in ("auto", 1) and not several_gpus():
        message = f"{wanted} GPUs for one job aren't supported yet: leave it at auto and name a larger gpuClass"
        return DoesNotFit(Reason.UNSUPPORTED, message, "resources.gpus")
    if spec.resources.gpu_class not in ("auto", *(gpu.name for gpu in classes)):
        return unknown_class(spec, classes)
    facts = detailed(facts)

    def fits(changed: QLoRAJobSpec) -> Option | None:
        return cheapest(changed, facts, classes, calibration, observations)

    found = fits(spec)
    if found is None and observations and observations.hopeful != observations:
        return _another_try(spec, facts, classes, settings, calibration, observations.hopeful)
    if found is None:
        return refusal(spec, facts, classes, fits, calibration, observations)
    cutter = Cutter(spec, facts, found, calibration, observations)
    cut = cutter.fastest()
    assert cut is not None  # noqa: S101 - the smallest fits
    return as_plan(spec, cut, found, cutter, settings, reason=_why(spec, cut, found, cutter))


def cheapest(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass],
    calibration: Calibration | None = None,
    observations: Observations | None = None,
) -> Option | None:
    """The first option, in the order of their cost, that holds the job when it is cut as small as the spec allows."""
    for option in options(spec, classes):
        cutter = Cutter(spec, facts, option, calibration, observations)
        smallest = cutter.smallest()
        if smallest is not None and cutter.fits(smallest):
            return option
    return None


def _another_try(
    spec: QLoRAJobSpec,
    facts: ModelFacts,
    classes: Sequence[GpuClass],
    settings: Settings,
    calibration: Calibration | None,
    observations: Observations,
) -> Plan | DoesNotFit:
    """The smallest cut on the largest class, where only runs that were out of memory say that it doesn't fit.

    Somebody asks for it again, and a GPU can be short of memory for another's sake.
    """
    found = [Cutter(spec, facts, option, calibration, observations) for option in options(spec, classes)]
    cuts = [(cutter, cut) for cutter in found if (cut := cutter.smallest()) and cutter.fits(cut)]
    if not cuts:
        return plan(spec, facts, classes, settings, calibration, observations)
    cutter, cut = max(cuts, key=lambda each: each[0].usable)
    reason = f"{_why(spec, cut, cutter.option, cutter)}, though such runs were out of memory: another try of the least"
    return as_plan(spec, cut, cutter.option, cutter, settings, reason=reason)


def as_plan(
    spec: QLoRAJobSpec, cut: Workload, option: Option, cutter: Cutter, settings: Settings, *, reason: str
) -> Plan:
    """The plan to train `cut` on `option`."""
    predicted = cutter.breakdown(cut)
    again, layers = cut.facts.layers - cut.kept_layers, cut.facts.layers
    return Plan(
        gpu_class=option.gpu.name,
        gpus=option.gpus,
        gpu_memory_mib=option.gpu.memory_mib,
        predicted_peak_bytes=predicted.total,
        breakdown=predicted.components,
        micro_batch_size=cut.shape.rows,
        gradient_accumulation=cut.accumulation,
        checkpointing="none" if not cut.shape.checkpointed_layers else "full" if again == layers else "partial",
        checkpointed_layers=cut.shape.checkpointed_layers,
        offload_checkpoints=cut.shape.offload,
        cache_weights=cut.shape.cached,
        strategy=option.strategy,
        predicted_tokens_per_second=rounded(cutter.speed(cut)),
        bf16=option.gpu.bf16,
        requests=gpu_requests(spec, cut, settings),
        reason=reason,
    )


def _why(spec: QLoRAJobSpec, cut: Workload, option: Option, cutter: Cutter) -> str:
    gpu = option.gpu.name if option.gpus == 1 else f"{option.gpus} × {option.gpu.name}"
    chosen = "is the cheapest class that holds the job" if spec.resources.gpu_class == "auto" else "holds that"
    rows = words.rows(cut.shape.rows, cut.length)
    return (
        f"{words.count(cut.facts.parameters)} parameters in 4 bit with {rows} {words.checkpointing(cut)}"
        f"{words.cache(cut.shape)} take about {words.gigabytes(cutter.predicted(cut))} and train about "
        f"{rounded(cutter.speed(cut)):,.0f} tokens/s: {gpu} ({words.gigabytes(cutter.usable)} usable) {chosen}"
    )


def rounded(speed: float) -> float:
    """Two digits: it is an estimate."""
    return float(f"{speed:.2g}")
