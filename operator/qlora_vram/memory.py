"""The memory model: a run's peak on each GPU as a sum of named components, and what it takes of host, disk and network.

Tensors follow from the model's and the run's shapes (docs/vram.md has the source of each term); what they don't tell,
the CUDA context and the allocator's slack, is `calibration`. A step is modelled as phases. The peak is that of the
largest, so that what never exists at the same time is never added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from qlora_vram.activations import Moment, Step
from qlora_vram.calibration import Calibration, shipped
from qlora_vram.fast import GRAPH_TOKENS, FastStep
from qlora_vram.gpus import GIB, MIB
from qlora_vram.optimizers import ADAPTER, GRADIENT, optimizer_bytes, workspace_bytes
from qlora_vram.plain import PlainStep
from qlora_vram.workload import Workload

Phase = Literal["loss", "backward", "optimizer"]

BLOCK: Final = 64
"""Weights that share a quantization constant (bitsandbytes' default block size)."""
NESTED_BLOCK: Final = 256
"""Constants that share a second one, with double quantization."""
PLAIN_SLACK: Final = 0.03
"""Share of what comes and goes that is lost beside the usual where operations run one at a time …"""
CHANGING_SLACK: Final = 0.1
"""… more where micro batches are of different lengths, which leaves holes (both measured on recipe r4) …"""
RECAST_SLACK: Final = 0.1
"""… and more where tensors of two widths take turns (measured on recipe r4 in two number types)."""
UNSLOTH_BYTES: Final = 128 * MIB
"""What the driver counts for Unsloth beyond the plain path's prediction (measured: 105 MiB at most, at 7B and one row
of 512 tokens; nothing for larger micro batches)."""
PROCESS_BYTES: Final = 4 * GIB
"""Host memory of a training process: Python, torch, CUDA, and the data."""
FILE_CACHE_BYTES: Final = 12 * GIB
"""Weight files that are read through memory count as the container's; beyond this the kernel drops them."""
DISK_BYTES: Final = 6 * GIB
"""Local checkpoints, logs, caches of compiled kernels."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A predicted peak. `components` are what exists at that moment, in bytes: what stays, what comes and goes."""

    components: Mapping[str, int]
    phase: Phase
    """When the peak is: while the loss is computed, in the last layer's backward pass, or in the optimizer's step."""

    @property
    def total(self) -> int:
        """The peak as the driver counts it, in bytes."""
        return sum(self.components.values())


def peak(workload: Workload, calibration: Calibration | None = None) -> Breakdown:
    """The peak of GPU memory on each GPU of a run. Never less with more rows, tokens, rank or parameters."""
    constants = calibration or shipped()
    found = _peak(workload, constants)
    if workload.engine == "plain" or workload.tokens <= GRAPH_TOKENS:
        return found
    # What small micro batches take beside their tensors ends where they are large. A little more work never takes less.
    largest_graph = replace(workload, length=GRAPH_TOKENS, shape=replace(workload.shape, rows=1))
    return max(found, _peak(largest_graph, constants), key=lambda each: each.total)


def _peak(workload: Workload, calibration: Calibration) -> Breakdown:
    steps = steps_of(workload)
    phases = [(name, components) for step in steps for name, components in _phases(workload, step)]
    # The first of equals: phases come in the order in which they happen.
    phase, largest = max(phases, key=lambda found: sum(found[1].values()))
    components = _static(workload, steps[0])
    for name, size in _with_slack(largest, slack_share(workload, calibration)).items():
        components[name] = components.get(name, 0) + size
    context = components.pop("context", 0) + calibration.context_bytes
    context += UNSLOTH_BYTES if workload.backend == "unsloth" else 0
    components |= {"slack": components.pop("slack"), "context": context}
    return Breakdown({name: size for name, size in components.items() if size}, phase)


def steps_of(workload: Workload) -> tuple[Step, ...]:
    """How the trainer may go through the layers: whether several rows need a mask depends on their padding."""
    if workload.engine == "fast":
        return (FastStep(workload),)
    if workload.packing:
        return (PlainStep(workload, masked=True),)
    plain = PlainStep(workload, masked=False)
    return (plain, PlainStep(workload, masked=True)) if workload.shape.rows > 1 else (plain,)


def step_of(workload: Workload) -> Step:
    """The way through the layers that keeps the most."""
    return max(steps_of(workload), key=lambda step: step.kept)


def _static(workload: Workload, step: Step) -> dict[str, int]:
    """What lives as long as the run does."""
    facts, gpus = workload.facts, workload.shape.gpus
    share = gpus if workload.shape.strategy == "fsdp" else 1
    quantized = facts.quantized_parameters
    wide = workload.compute_bytes * max(0, facts.parameters - quantized)
    standing = step.standing
    adapter = workload.adapter_parameters
    components = {
        "quantizedWeights": int(quantized * bits_a_weight(workload.double_quantization) / 8) // share,
        "weights16Bit": wide // share,
        "adapter": ADAPTER * adapter // share + standing.pop("adapter", 0),
        "gradients": GRADIENT * adapter // share,
        "optimizer": optimizer_bytes(workload) // share,
        **standing,
    }
    if workload.shape.strategy == "ddp":
        components["communication"] = GRADIENT * adapter  # buckets
    if workload.shape.strategy == "fsdp":
        components["communication"] = 2 * _largest_unit(workload)  # one in use, one on its way
    return components


def _phases(workload: Workload, step: Step) -> Iterator[tuple[Phase, dict[str, int]]]:
    """What comes and goes, by phase of a step."""
    shape = workload.shape
    checkpointed = workload.facts.layers - workload.kept_layers
    # Of offloaded checkpoints, one is in use and the next on its way.
    checkpoints = step.offloaded * min(2, checkpointed) if shape.offload else step.checkpoint * checkpointed
    loss = max(step.in_loss, key=lambda moment: moment.total)
    yield "loss", _components(loss, checkpoints, step.kept * workload.kept_layers)
    layer = max(step.in_layer, key=lambda moment: moment.total)
    yield "backward", _components(layer, checkpoints, step.kept * max(0, workload.kept_layers - 1))
    yield "optimizer", {"optimizer": workspace_bytes(workload)}


def _components(moment: Moment, checkpoints: int, kept: int) -> dict[str, int]:
    return {
        "checkpoints": checkpoints,
        "activations": kept,
        "layer": moment.working,
        "loss": moment.loss,
        "dequantization": moment.dequantization,
    }


def slack_share(workload: Workload, calibration: Calibration) -> float:
    """What the allocator holds and can't use, as a share of what comes and goes."""
    share = calibration.slack_share + (RECAST_SLACK if workload.recast else 0)
    if workload.engine == "plain":
        share += PLAIN_SLACK + (CHANGING_SLACK if workload.changing else 0)
    return share


def _with_slack(components: Mapping[str, int], share: float) -> dict[str, int]:
    return {**components, "slack": int(share * sum(components.values()))}


def bits_a_weight(double_quantization: bool) -> float:
    """Bits of a 4-bit weight and its share of the constants: 4.127, or 4.5 without double quantization."""
    return 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK) if double_quantization else 4 + 32 / BLOCK


def _largest_unit(workload: Workload) -> int:
    """What FSDP gathers at once: a layer, or the embeddings, or the head."""
    facts = workload.facts
    layers = max(1, facts.layers)
    layer = int(facts.quantized_parameters * bits_a_weight(workload.double_quantization) / 8)
    layer += workload.compute_bytes * facts.expert_parameters + ADAPTER * workload.adapter_parameters
    return max(layer // layers, workload.compute_bytes * max(facts.embedding_parameters, facts.head_parameters))


# Beside the GPU


def host_bytes(workload: Workload) -> int:
    """Host memory of the training container, offloaded checkpoints and paged optimizer states included."""
    files = min(workload.facts.weight_bytes, FILE_CACHE_BYTES)
    paged = optimizer_bytes(workload) if workload.optimizer.startswith("paged") else 0
    parked = 0
    if workload.shape.offload:
        parked = page_locked(step_of(workload).offloaded) * (workload.facts.layers - workload.kept_layers)
    gathered = 3 * ADAPTER * workload.adapter_parameters  # a checkpoint is put together in memory
    return workload.shape.gpus * (PROCESS_BYTES + parked + paged) + files + gathered


def page_locked(size: int) -> int:
    """Bytes of a page-locked block: torch makes them as large as a power of two (CachingHostAllocator)."""
    return 1 << (size - 1).bit_length()


def disk_bytes(workload: Workload, *, downloads: bool) -> int:
    """Local disk of the training container; `downloads` unless a shared volume holds the weights."""
    kept = 4 * ADAPTER * workload.adapter_parameters  # adapter and checkpoint, with optimizer states, while they upload
    return DISK_BYTES + kept + (5 * download_bytes(workload) // 4 if downloads else 0)


def download_bytes(workload: Workload) -> int:
    """What a machine without the weights fetches: the weight files, in 16 bit where their size isn't known."""
    return workload.facts.weight_bytes or 2 * workload.facts.parameters
