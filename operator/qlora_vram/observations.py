"""What finished runs really took, and what that says about the next ones. Pure.

A *job* here is everything that memory follows from and a planner doesn't choose: model, adapter, quantization,
optimizer, packing, engine, compute type, GPUs, their class, and the trainer's image. Its *cuts* have an order: fewer
rows, shorter rows, a lower rank, more checkpointed layers, checkpoints in host memory and no cache of weights never
take more. So one measured cut bounds the others: none below it is expected to take more, and none above it less. What
is expected is therefore monotone in the cut, as the prediction is, and a planner can't flee from a bad measurement to a
cut that is larger but was never measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from statistics import median
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError

from qlora_vram.gpus import MIB, GpuClass, usable_bytes
from qlora_vram.memory import Breakdown
from qlora_vram.workload import Workload
from qlorajob.base import ContractModel
from qlorajob.identity import digest
from qlorajob.plan import ModelFacts

LIMIT: Final = 200
"""Observations that are kept; the oldest make way. At 600 bytes each that is a tenth of what a ConfigMap holds."""
RECENT: Final = 20
"""Observations on a class that its correction is taken from."""
ENOUGH: Final = 3
"""Fewer observations of other jobs say nothing about a class."""
MOST: Final = 10
"""A correction moves the prediction of a cut that wasn't measured by at most this, in percent."""
PLAUSIBLE_SHARE: Final = 0.8
"""A peak below this share of the tensors' sizes is no measurement of that run: it isn't used at all."""
NO_TENSOR: Final = frozenset({"slack", "context"})
"""Components that don't follow from shapes. A measurement doesn't tell them apart, so `observed` stands for both."""
CHOSEN: Final = frozenset({"facts", "shape", "length", "rank", "accumulation"})
"""Fields of a workload that don't make the job; the model's are taken apart, and accumulation takes no memory."""


Cut = tuple[int, int, int, int, bool, bool]
"""Rows, length, rank, −checkpointed layers, not offloaded, weights cached."""


class Observation(ContractModel):
    """One run that has ended."""

    job: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Digest of what the planner doesn't choose."""
    rows: Annotated[int, Field(ge=1)]
    """Micro batch."""
    length: Annotated[int, Field(ge=1)]
    """Tokens of a row, filled up."""
    rank: Annotated[int, Field(ge=0)]
    """The adapter's."""
    checkpointed_layers: Annotated[int, Field(ge=0)]
    """Layers that computed their forward pass again."""
    offload: bool = False
    """Their inputs waited in host memory."""
    cached: bool = False
    """The weights were there in 16 bit too."""
    gpu_class: str
    """Name of the class."""
    trainer: str
    """Image of the trainer."""
    peak_bytes: Annotated[int, Field(ge=1)]
    """Measured peak on each GPU, as the driver counts it."""
    predicted_bytes: Annotated[int, Field(ge=0)]
    """What the memory model predicts, without corrections."""
    physical_bytes: Annotated[int, Field(ge=0)]
    """The tensors' part of that."""
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Measured speed, without padding."""
    at: datetime
    """When the run ended."""
    out_of_memory: bool = False
    """It ended because the GPU's memory did: peakBytes is all there is, and the run would have taken more."""

    @property
    def key(self) -> str:
        """Names the shape: the next run of the same job in the same cut replaces this one.

        Without a cache it is what it was before there was any: else older entries would be nobody's, and never go.
        """
        return digest([self.job, *(self.cut if self.cached else self.cut[:-1])])[:16]

    @property
    def cut(self) -> Cut:
        """In the order in which memory grows: each number with the others fixed."""
        return (self.rows, self.length, self.rank, -self.checkpointed_layers, not self.offload, self.cached)

    def to_json(self) -> str:
        """As it is stored."""
        return self.model_dump_json(by_alias=True, exclude_none=True)

    @property
    def plausible(self) -> bool:
        """It can have been measured on this run."""
        return self.out_of_memory or self.peak_bytes >= PLAUSIBLE_SHARE * self.physical_bytes


@dataclass(frozen=True)
class Observations:
    """What is known, by key."""

    entries: Mapping[str, Observation] = field(default_factory=dict)
    trainer: str = ""
    """The image that is used now. Another one's runs say nothing about its memory."""

    @classmethod
    def read(cls, data: Mapping[str, str], trainer: str) -> Observations:
        """From the JSON text of each. What isn't an observation, or isn't where its shape says, is passed over."""
        found = {}
        for key, text in data.items():
            try:
                observation = Observation.model_validate_json(text)
            except ValidationError:
                continue
            if observation.key == key and observation.at.tzinfo is not None:
                found[key] = observation
        return cls(found, trainer)

    def including(self, observation: Observation) -> Observations:
        """With one more, or a newer one of its shape; never more than LIMIT."""
        grown = dataclasses.replace(self, entries={**self.entries, observation.key: observation})
        surplus = grown.surplus
        return dataclasses.replace(grown, entries={k: o for k, o in grown.entries.items() if k not in surplus})

    @property
    def surplus(self) -> tuple[str, ...]:
        """Keys of the oldest, if there are more than LIMIT."""
        by_age = sorted(self.entries, key=lambda key: (self.entries[key].at, key))
        return tuple(by_age[: max(0, len(by_age) - LIMIT)])

    @cached_property
    def usable(self) -> tuple[Observation, ...]:
        """This trainer's, without what can't be true; newest first."""
        mine = [seen for seen in self.entries.values() if seen.trainer == self.trainer and seen.plausible]
        return tuple(sorted(mine, key=lambda seen: (seen.at, seen.key), reverse=True))

    @cached_property
    def _jobs(self) -> dict[str, tuple[Observation, ...]]:
        return {job: tuple(seen for seen in self.usable if seen.job == job) for job in {o.job for o in self.usable}}

    @cached_property
    def _class_residuals(self) -> dict[str, int]:
        """What runs of a class took more than predicted, in bytes."""
        found = {}
        for name in {seen.gpu_class for seen in self.usable}:
            recent = [seen for seen in self.usable if seen.gpu_class == name and not seen.out_of_memory][:RECENT]
            if len(recent) >= ENOUGH:
                found[name] = _residual(recent)
        return found

    def ended_well(self, job: str) -> tuple[Observation, ...]:
        """Its cuts that were measured."""
        return tuple(seen for seen in self._jobs.get(job, ()) if not seen.out_of_memory)

    def out_of_memory(self, job: str) -> tuple[Observation, ...]:
        """Its cuts that a GPU couldn't hold; not those that a cut which takes no less has proved wrong."""
        held = self.ended_well(job)
        failed = (seen for seen in self._jobs.get(job, ()) if seen.out_of_memory)
        return tuple(seen for seen in failed if not any(_within(seen.cut, other.cut) for other in held))

    @cached_property
    def hopeful(self) -> Observations:
        """Without the runs that were out of memory."""
        return dataclasses.replace(self, entries={k: o for k, o in self.entries.items() if not o.out_of_memory})

    def exact(self, workload: Workload, gpu: GpuClass) -> Observation | None:
        """What was measured of this very shape."""
        if not self.usable:
            return None
        cut = _cut(workload)
        seen = (seen for seen in self.ended_well(job_of(workload, gpu.name, self.trainer)) if seen.cut == cut)
        return next(seen, None)

    def residual(self, job: str, gpu_class: str) -> int | None:
        """Bytes to add to the prediction of a cut that wasn't measured; None where too little is known."""
        mine = self.ended_well(job)
        return _residual(mine) if mine else self._class_residuals.get(gpu_class)


def observe(
    workload: Workload,
    gpu: GpuClass,
    predicted: Breakdown,
    *,
    trainer: str,
    peak_bytes: int,
    tokens_per_second: float | None,
    at: datetime,
) -> Observation:
    """The observation of a run of `workload` on `gpu`; `predicted` is the memory model's own, uncorrected."""
    rows, length, rank, minus_checkpointed, _, cached = _cut(workload)
    return Observation(
        job=job_of(workload, gpu.name, trainer),
        rows=rows,
        length=length,
        rank=rank,
        checkpointed_layers=-minus_checkpointed,
        offload=workload.shape.offload,
        cached=cached,
        gpu_class=gpu.name,
        trainer=trainer,
        peak_bytes=peak_bytes,
        predicted_bytes=predicted.total,
        physical_bytes=physical(predicted),
        tokens_per_second=tokens_per_second,
        at=at,
    )


def exhausted(workload: Workload, gpu: GpuClass, predicted: Breakdown, *, trainer: str, at: datetime) -> Observation:
    """The observation of a run of `workload` that was out of memory on `gpu`."""
    there = max(gpu.memory_mib * MIB, usable_bytes(gpu) + 1)
    seen = observe(workload, gpu, predicted, trainer=trainer, peak_bytes=there, tokens_per_second=None, at=at)
    return seen.model_copy(update={"out_of_memory": True})


def corrected(predicted: Breakdown, workload: Workload, gpu: GpuClass, observations: Observations) -> Breakdown:
    """The peak to expect, where something is known. Never below what the tensors take.

    The same shape: what was measured. Another cut of a measured job: the prediction plus that job's residual, between
    what smaller and what larger cuts took. Another job: the prediction plus the class's residual. A job that was out of
    memory: in that cut and in larger ones more than there is, in others the most that a prediction is moved by.
    """
    if not observations.usable:
        return predicted
    job = job_of(workload, gpu.name, observations.trainer)
    residual, failed = observations.residual(job, gpu.name), observations.out_of_memory(job)
    if residual is None and not failed:
        return predicted
    most = predicted.total * MOST // 100
    expected = predicted.total + (most if failed else max(-most, min(residual or 0, most)))
    cut = _cut(workload)
    # It ended well, so it fits: a peak beyond what plans may fill mustn't refuse the class that held the run.
    measured = [(seen.cut, min(seen.peak_bytes, usable_bytes(gpu))) for seen in observations.ended_well(job)]
    expected = min([expected, *(took for other, took in measured if _within(cut, other))])
    measured += [(seen.cut, max(seen.peak_bytes, usable_bytes(gpu) + 1)) for seen in failed]
    expected = max([expected, *(took for other, took in measured if _within(other, cut))])
    return _with_total(predicted, expected)


def physical(predicted: Breakdown) -> int:
    """Bytes that follow from shapes."""
    return sum(size for name, size in predicted.components.items() if name not in NO_TENSOR)


def job_of(workload: Workload, gpu_class: str, trainer: str) -> str:
    """Digest of everything that the peak follows from, but the cut."""
    shape = workload.shape
    parts: dict[str, Any] = {
        each.name: getattr(workload, each.name) for each in dataclasses.fields(workload) if each.name not in CHOSEN
    }
    parts["targets"] = [target.model_dump() for target in workload.targets]
    parts |= {"facts": _facts(workload.facts), "gpus": shape.gpus, "strategy": shape.strategy}
    return digest(parts | {"gpuClass": gpu_class, "trainer": trainer})[:16]


@lru_cache(maxsize=64)
def _facts(facts: ModelFacts) -> str:
    """Digest of the model. Its files' size isn't always known, and isn't on the GPU."""
    return digest(facts.model_dump(mode="json", exclude={"weight_bytes"}))


def _cut(workload: Workload) -> Cut:
    """As `Observation.cut`."""
    shape = workload.shape
    checkpointed = workload.facts.layers - workload.kept_layers
    length = workload.tokens // shape.rows
    return (shape.rows, length, workload.rank, -checkpointed, not shape.offload, shape.cached)


def _within(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """A cut that never takes more than the other."""
    return all(mine <= its for mine, its in zip(one, other, strict=True))


def _residual(seen: list[Observation] | tuple[Observation, ...]) -> int:
    return int(median(each.peak_bytes - each.predicted_bytes for each in seen))


def _with_total(predicted: Breakdown, total: int) -> Breakdown:
    """The tensors, and beside them `observed`: what was seen beyond them."""
    parts = {name: size for name, size in predicted.components.items() if name not in NO_TENSOR}
    beyond = total - sum(parts.values())
    return Breakdown({**parts, "observed": beyond} if beyond > 0 else parts, predicted.phase)
