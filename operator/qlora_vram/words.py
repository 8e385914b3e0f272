"""Quantities in words: for messages, and for Kubernetes."""

from __future__ import annotations

import math

from qlora_vram.gpus import GIB
from qlora_vram.workload import Shape, Workload


def gigabytes(size: int) -> str:
    """`12.3 GB`, decimal, as GPU vendors count."""
    return f"{size / 1e9:.1f} GB"


def count(parameters: int) -> str:
    """`6.7B`, or `135M`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def quantity(size: int) -> str:
    """A Kubernetes quantity, rounded up to half a GiB, so that the pod spec stays readable."""
    halves = math.ceil(size / (GIB // 2))
    return f"{halves // 2}Gi" if halves % 2 == 0 else f"{halves * 512}Mi"


def rows(number: int, length: int) -> str:
    """`4 rows of 2048 tokens`."""
    return f"{number} {'row' if number == 1 else 'rows'} of {length} tokens"


def checkpointing(workload: Workload) -> str:
    """What is computed again, as a clause."""
    layers, again = workload.facts.layers, min(workload.shape.checkpointed_layers, workload.facts.layers)
    if not again:
        return "without checkpointing"
    where = " (checkpoints in host memory)" if workload.shape.offload else ""
    return f"with checkpointing{where}" if again == layers else f"with {again} of {layers} layers checkpointed{where}"


def cache(shape: Shape) -> str:
    """Whether weights are there twice, to be added to that clause."""
    return ", weights in 16 bit too," if shape.cached else ""
