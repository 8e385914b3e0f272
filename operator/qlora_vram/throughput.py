"""Predicted speed: a roofline of products, memory traffic and kernel launches. For ranking plans, and for an ETA.

Fitted to H100 runs (docs/results/speed, docs/vram.md): products reach 80 % of the datasheet; what isn't a product moves
each kept activation five to seven times a pass; PEFT's modules take Python 5.4 ms a pass through one layer.
"""

from __future__ import annotations

from typing import Final

from qlora_vram.fast import FastStep
from qlora_vram.gpus import GpuClass
from qlora_vram.memory import step_of
from qlora_vram.workload import Engine, Workload

PRODUCT_SHARE: Final = 0.8
"""Of a GPU's dense 16-bit throughput, what large products reach: 790 of 989 TFLOP/s on an H100."""
BANDWIDTH_SHARE: Final = 0.8
"""Of a GPU's memory bandwidth, what streaming kernels reach."""
TRAFFIC: Final[dict[Engine, float]] = {"plain": 7, "fast": 5}
"""How often a pass through a layer moves what the layer would keep (fitted to an 8B model at 4 × 2048 tokens)."""
DEQUANTIZATION_BYTES: Final = 2.6
"""Memory traffic of one weight: half a byte and a constant read, two bytes written."""
LAUNCH_SECONDS: Final[dict[Engine, float]] = {"plain": 5.4e-3, "fast": 1.2e-3}
"""Python's time for one pass through one layer: what small micro batches run at, however fast the GPU is."""
GRAPH_SECONDS: Final = 2e-4
"""A CUDA graph's time for the same."""
BUS_BYTES: Final = 12e9
"""Bytes a second between host and GPU that offloaded checkpoints can count on (PCIe 3, 16 lanes)."""
UPDATE_SECONDS: Final[dict[Engine, float]] = {"plain": 1e-4, "fast": 1.5e-5}
"""The optimizer's time for each tensor of the adapter."""
UNKNOWN_TFLOPS: Final = 50.0
UNKNOWN_BANDWIDTH: Final = 400.0
"""For a class of which nobody said how fast it is."""


def tokens_per_second(workload: Workload, gpu: GpuClass) -> float:
    """Tokens of all GPUs of a run a second, padding counted; 0 for a model without layers."""
    if not workload.facts.layers:
        return 0.0
    micro = micro_batch_seconds(workload, gpu)
    tensors = 2 * sum(target.count for target in workload.targets)
    step = workload.accumulation * micro + tensors * UPDATE_SECONDS[workload.engine]
    return workload.shape.gpus * workload.accumulation * workload.tokens / step


def micro_batch_seconds(workload: Workload, gpu: GpuClass) -> float:
    """Forward and backward of one micro batch: launching runs beside computing, and so do copies to the host."""
    tflops = gpu.tflops or UNKNOWN_TFLOPS
    bandwidth = BANDWIDTH_SHARE * 1e9 * (gpu.bandwidth_gbs or UNKNOWN_BANDWIDTH)
    products = flops(workload) / (PRODUCT_SHARE * 1e12 * tflops)
    moved = _passes(workload) * workload.facts.layers * TRAFFIC[workload.engine] * step_of(workload).kept
    weights = 0 if workload.shape.cached else workload.facts.quantized_parameters
    dequantized = _passes(workload, backward=1) * DEQUANTIZATION_BYTES * weights
    launches = _passes(workload) * workload.facts.layers * _launch_seconds(workload)
    return max(products + (moved + dequantized) / bandwidth, launches, _copies(workload))


def flops(workload: Workload) -> float:
    """Operations of one micro batch. The base is frozen: forward, gradient of the input, and what runs again.

    Attention is causal: half of all pairs of tokens, two products forward and five backward.
    """
    facts, layer = workload.facts, workload.layer
    visited = facts.quantized_parameters + _expert_parameters_visited(workload)
    again = _checkpointed_share(workload)
    pairs = workload.tokens * workload.length / 2
    attention = facts.layers * 4 * layer.queries * pairs * (1 + 2.5 + again)
    head = (6 if workload.engine == "plain" else 4) * facts.vocabulary * facts.hidden_size
    adapter = 2 * workload.adapter_parameters * (3 + again)
    return workload.tokens * (2 * visited * (2 + again) + head + adapter) + attention


def _launch_seconds(workload: Workload) -> float:
    # Of rows of changing lengths only those are replayed that are much shorter than planned: not to be counted on.
    graphs = workload.engine == "fast" and not workload.changing and FastStep(workload).graphs
    return GRAPH_SECONDS if graphs else LAUNCH_SECONDS[workload.engine]


def _passes(workload: Workload, backward: int = 2) -> float:
    """Passes through a layer: forward, again where it is checkpointed, and backward, which counts for `backward`."""
    return 1 + _checkpointed_share(workload) + backward


def _checkpointed_share(workload: Workload) -> float:
    return 1 - workload.kept_layers / max(1, workload.facts.layers)


def _expert_parameters_visited(workload: Workload) -> float:
    """Of the experts' parameters, those that one token's products take: three matrices as wide as it sees."""
    facts = workload.facts
    return min(facts.expert_parameters, 3 * facts.layers * facts.hidden_size * facts.intermediate_size)


def _copies(workload: Workload) -> float:
    """Seconds on the bus, out and back."""
    if not workload.shape.offload:
        return 0.0
    return 2 * step_of(workload).offloaded * workload.shape.checkpointed_layers / BUS_BYTES
