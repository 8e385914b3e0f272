"""From what a label, a driver or an administrator says of a GPU to its class: a known one, or one of its own. Pure.

The operator reads nodes and ResourceSlices with it, the command line this machine's driver.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from qlora_vram.gpus import KNOWN, MIG_PROFILE, GpuClass, mig_slice

LABEL_SHARE: Final = 0.97
"""CUDA can use at least so much of the memory that the driver counts."""
LEAST_MIB: Final = 1024
"""Less isn't worth a class."""
MIG_INFIX: Final = "-MIG-"
OLDEST_CAPABILITY: Final = 7.5
"""Of a GPU that doesn't say: no bfloat16, so right everywhere."""
SPEED: Final = ("tflops", "bandwidth_gbs")
FACTS: Final = (*SPEED, "compute_capability", "cost", "gpus_per_node", "resource")
_NOT_IN_LABELS: Final = re.compile(r"[^A-Za-z0-9-_. ]")


def product_label(name: str) -> str:
    """A product's name as GPU feature discovery writes it into a label: 'Tesla T4' → 'Tesla-T4'."""
    return "-".join(_NOT_IN_LABELS.sub("", name).split())


def recognize(
    product: str, counted_mib: int, capability: float | None = None, known: Sequence[GpuClass] = KNOWN
) -> GpuClass | None:
    """The class of a product label such as NVIDIA-A10 or NVIDIA-A100-SXM4-80GB-MIG-1g.10gb.

    `counted_mib` is the memory as the driver counts it, `capability` the CUDA compute capability where it is said.
    What isn't in `known` gets a class of its own. None where the memory can't be known, or is too little.
    """
    usable_mib = int(counted_mib * LABEL_SHARE)
    found = next((gpu for gpu in known if product in gpu.products), None)
    if found:
        less = {"memory_mib": counted_mib} if LEAST_MIB <= counted_mib < found.memory_mib else {}
        return found.model_copy(update=less)
    if usable_mib < LEAST_MIB:
        return None
    whole, _, profile = product.partition(MIG_INFIX)
    parent = next((gpu for gpu in known if whole in gpu.products), None)
    if parent and MIG_PROFILE.match(profile):
        return mig_slice(parent, profile, usable_mib).model_copy(update={"products": (product,)})
    return complete(
        GpuClass(
            name=product.removeprefix("NVIDIA-"),
            memory_mib=usable_mib,
            compute_capability=capability or OLDEST_CAPABILITY,
            products=(product,),
        )
    )


def complete(gpu: GpuClass) -> GpuClass:
    """`gpu` with what it leaves unsaid, from the known class of its name or products.

    Without one: speed from the class that is most like it, cost in proportion to the memory.
    """
    for known in KNOWN:
        if known.name == gpu.name or set(known.products) & set(gpu.products):
            pinned = gpu.node_labels or gpu.device_class
            return gpu.model_copy(update=_unsaid(gpu, known, FACTS if pinned else (*FACTS, "products")))
    like = nearest(gpu)
    priced = like.model_copy(update={"cost": round(like.cost * gpu.memory_mib / like.memory_mib, 2)})
    return gpu.model_copy(update=_unsaid(gpu, priced, (*SPEED, "cost")))


def nearest(gpu: GpuClass) -> GpuClass:
    """The known class that is most like it: whole or slice, of about its memory and generation."""

    def distance(known: GpuClass) -> float:
        doublings = abs(math.log2(known.memory_mib / gpu.memory_mib))
        return doublings + abs(known.compute_capability - gpu.compute_capability)

    return min((known for known in KNOWN if known.is_slice == gpu.is_slice), key=distance)


def _unsaid(gpu: GpuClass, other: GpuClass, fields: Iterable[str]) -> dict[str, Any]:
    return {field: getattr(other, field) for field in fields if field not in gpu.model_fields_set}
