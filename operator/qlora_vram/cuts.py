"""How a run can be cut to a class of GPU: micro batch, checkpointing, offloading, a cache. And which cut is fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from qlora_vram.calibration import Calibration
from qlora_vram.gpus import GpuClass, usable_bytes
from qlora_vram.memory import Breakdown, peak
from qlora_vram.observations import Observations, corrected
from qlora_vram.throughput import tokens_per_second
from qlora_vram.workload import Shape, Strategy, Workload, workload
from qlorajob.plan import ModelFacts, Plan
from qlorajob.spec import QLoRAJobSpec

TRAINER_STRATEGIES: Final[tuple[Strategy, ...]] = ("single",)
"""What the trainer can do today. With ddp or fsdp here, plans with several GPUs follow."""
MAX_AUTO_ROWS: Final = 64
"""More rows at once hardly train faster."""
AS_FAST: Final = 0.98
"""Speeds that differ by less are equal, as far as predictions go: the cut with the most room is taken."""
CACHE_ROOM: Final = 0.9
"""Share of the usable memory that weights in 16 bit may fill up: they are for what is free, and must end no run."""


def several_gpus() -> bool:
    """The trainer can spread a run over GPUs."""
    return any(strategy != "single" for strategy in TRAINER_STRATEGIES)


@dataclass(frozen=True, slots=True)
class Option:
    """GPUs that a run could have."""

    gpu: GpuClass
    gpus: int = 1
    strategy: Strategy = "single"

    @property
    def order(self) -> tuple[bool, float, int, int, str]:
        """One GPU before several; then the cheapest; of equally cheap ones the smallest."""
        return (self.gpus > 1, self.gpu.cost * self.gpus, self.gpu.memory_mib * self.gpus, self.gpus, self.gpu.name)


def options(spec: QLoRAJobSpec, classes: Sequence[GpuClass]) -> tuple[Option, ...]:
    """What `spec` allows of these classes, in the order in which they are tried."""
    wanted = spec.resources.gpus
    found = []
    for gpu in classes:
        if spec.resources.gpu_class not in ("auto", gpu.name):
            continue
        found += [Option(gpu)] if wanted in ("auto", 1) else []
        numbers = range(2, gpu.gpus_per_node + 1) if wanted == "auto" else [wanted]
        found += [
            Option(gpu, number, strategy)
            for number in numbers
            for strategy in TRAINER_STRATEGIES
            if 1 < number <= gpu.gpus_per_node and strategy != "single"
        ]
    return tuple(sorted(found, key=lambda option: option.order))


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts one job to one option."""

    spec: QLoRAJobSpec
    facts: ModelFacts
    option: Option
    calibration: Calibration | None = None
    observations: Observations | None = None
    """What earlier runs took."""

    @property
    def usable(self) -> int:
        """Bytes of each GPU that a plan may fill."""
        return usable_bytes(self.option.gpu)

    def smallest(self) -> Workload | None:
        """The cut that takes the least memory; None where the global batch can't be divided over the GPUs."""
        rows = min(self.rows(), default=None)
        if rows is None:
            return None
        # Checkpointing the last layer saves memory only where the loss takes the most.
        cuts = [self._cut(rows, layers, offload=self.may_offload) for layers in self.checkpointed()[-2:]]
        return min(cuts, key=self.predicted)

    def fits(self, cut: Workload) -> bool:
        """The predicted peak leaves the margin free."""
        return self.predicted(cut) <= self.usable

    def predicted(self, cut: Workload) -> int:
        """The peak to expect of a cut, in bytes."""
        return self.breakdown(cut).total

    def breakdown(self, cut: Workload) -> Breakdown:
        """That peak by component, corrected by what was observed."""
        modelled = self.modelled(cut)
        return corrected(modelled, cut, self.option.gpu, self.observations) if self.observations else modelled

    def modelled(self, cut: Workload) -> Breakdown:
        """What the memory model alone predicts."""
        return peak(cut, self.calibration)

    def speed(self, cut: Workload) -> float:
        """Tokens a second: as measured, where rows have no padding that a measurement leaves out; else predicted."""
        seen = self.observations.exact(cut, self.option.gpu) if self.observations and cut.packing else None
        measured = seen.tokens_per_second if seen else None
        return measured or tokens_per_second(cut, self.option.gpu)

    def fastest(self) -> Workload | None:
        """The cut with the best predicted speed of those that fit, with what memory it leaves free put to use."""
        cut = self._fastest_without_cache()
        return cut and self._cached(cut)

    def _cached(self, cut: Workload) -> Workload:
        """`cut` with its weights in 16 bit too, where there is room for them and that gains enough.

        Whether there is room is asked of the memory model: what a run took must fit, but changes no shape that did.
        """
        cached = self.recut(cut, cached=True)
        gains = tokens_per_second(cut, self.option.gpu) < AS_FAST * tokens_per_second(cached, self.option.gpu)
        room = self.modelled(cached).total <= CACHE_ROOM * self.usable
        return cached if cut.engine == "fast" and gains and room and self.fits(cached) else cut

    def _fastest_without_cache(self) -> Workload | None:
        """Checkpoints leave the GPU only if they must; Unsloth's always do."""
        own_way = self.spec.training.backend == "unsloth" and self.may_offload
        cuts = ([] if own_way else list(self._fitting(offload=False))) or list(self._fitting(offload=True))
        speeds = [(tokens_per_second(cut, self.option.gpu), cut) for cut in cuts]
        if not speeds:
            return None
        enough = AS_FAST * max(speed for speed, _ in speeds)
        return min((cut for speed, cut in speeds if speed >= enough), key=self.predicted)

    def _fitting(self, *, offload: bool) -> Iterator[Workload]:
        """For each micro batch the cut with the fewest checkpointed layers."""
        for rows in self.rows() if self.may_offload or not offload else ():
            least = self._fewest_checkpointed(rows, offload=offload)
            if least is not None:
                yield least

    def _fewest_checkpointed(self, rows: int, *, offload: bool) -> Workload | None:
        """By bisection: each checkpointed layer but the last takes less memory than one that keeps its activations."""
        allowed = self.checkpointed()
        low, high = 0, max(0, len(allowed) - 2)
        if not self.fits(self._cut(rows, allowed[high], offload=offload)):
            every = self._cut(rows, allowed[-1], offload=offload)
            return every if self.fits(every) else None
        while low < high:
            middle = (low + high) // 2
            if self.fits(self._cut(rows, allowed[middle], offload=offload)):
                high = middle
            else:
                low = middle + 1
        return self._cut(rows, allowed[high], offload=offload)

    def rows(self) -> list[int]:
        """Micro batches that divide what one GPU sees of the global batch."""
        each, left = divmod(self.spec.training.global_batch_size, self.option.gpus)
        asked = self.spec.training.micro_batch_size
        if left or (isinstance(asked, int) and each % asked):
            return []
        return [asked] if isinstance(asked, int) else [n for n in range(1, MAX_AUTO_ROWS + 1) if each % n == 0]

    def checkpointed(self) -> range:
        """Numbers of checkpointed layers that are allowed, ascending."""
        asked, layers = self.spec.training.gradient_checkpointing, self.facts.layers
        if isinstance(asked, bool):
            return range(layers, layers + 1) if asked else range(1)
        return range(layers + 1)

    @property
    def may_offload(self) -> bool:
        """Checkpoints may wait in host memory, if there are any."""
        return self.spec.training.gradient_checkpointing is not False and self.facts.layers > 0

    def _cut(self, rows: int, checkpointed: int, *, offload: bool) -> Workload:
        return self.cut(Shape(rows, checkpointed, offload and checkpointed > 0))

    def cut(self, shape: Shape) -> Workload:
        """The run in this shape, on the option's GPUs, at the global batch that the spec asks for."""
        shape = replace(shape, gpus=self.option.gpus, strategy=self.option.strategy)
        accumulation = self.spec.training.global_batch_size // (shape.rows * shape.gpus)
        return workload(self.spec, self.facts, self.option.gpu, shape, accumulation)

    def planned(self, plan: Plan) -> Workload:
        """The cut that `plan` is for."""
        checkpointed = {"none": 0, "partial": plan.checkpointed_layers, "full": self.facts.layers}[plan.checkpointing]
        return self.cut(Shape(plan.micro_batch_size, checkpointed, plan.offload_checkpoints, cached=plan.cache_weights))

    def recut(self, cut: Workload, **changes: int) -> Workload:
        """A cut with another shape, at the same global batch."""
        return self.cut(replace(cut.shape, **changes))  # type: ignore[arg-type]
