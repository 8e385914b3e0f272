"""The GPUs the planner knows when the administrator names none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qlora_operator.config import GpuClass

GIB: Final = 1024**3
MIB: Final = 1024**2
CPU: Final = "cpu"
"""resources.gpuClass for training without a GPU."""
RESERVED_BYTES: Final = 700 * MIB
"""CUDA context, cuBLAS workspaces and the driver's own: not ours to plan with."""
USABLE_SHARE: Final = 0.97
"""The rest is lost to fragmentation in the caching allocator."""


def _gpu(name: str, memory_mib: int, cost: float, *products: str, bf16: bool = True) -> GpuClass:
    return GpuClass(name=name, memory_mib=memory_mib, cost=cost, products=products, bf16=bf16)


SHIPPED: Final[tuple[GpuClass, ...]] = (
    _gpu("RTX-2080-Ti", 11011, 0.3, "NVIDIA-GeForce-RTX-2080-Ti", bf16=False),
    _gpu("RTX-3060", 12045, 0.3, "NVIDIA-GeForce-RTX-3060"),
    _gpu("T4", 15079, 0.4, "Tesla-T4", "Tesla-T4-SHARED", bf16=False),
    _gpu("V100-16GB", 16144, 0.9, "Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB", bf16=False),
    _gpu("A10", 22512, 0.8, "NVIDIA-A10", "NVIDIA-A10G"),
    _gpu("L4", 22513, 0.7, "NVIDIA-L4"),
    _gpu("A30", 24062, 1.2, "NVIDIA-A30"),
    _gpu("RTX-3090", 24124, 0.6, "NVIDIA-GeForce-RTX-3090"),
    _gpu("RTX-4090", 24080, 0.8, "NVIDIA-GeForce-RTX-4090"),
    _gpu("RTX-5090", 32089, 1.0, "NVIDIA-GeForce-RTX-5090"),
    _gpu("V100-32GB", 32480, 1.3, "Tesla-V100-SXM2-32GB", "Tesla-V100-PCIE-32GB", bf16=False),
    _gpu("A100-40GB", 39538, 2.0, "A100-SXM4-40GB", "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    _gpu("A40", 45372, 1.4, "NVIDIA-A40"),
    _gpu("L40S", 45373, 1.6, "NVIDIA-L40S", "NVIDIA-L40"),
    _gpu("RTX-A6000", 48676, 1.4, "NVIDIA-RTX-A6000", "NVIDIA-RTX-6000-Ada-Generation"),
    _gpu("A100-80GB", 80994, 3.0, "NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    _gpu("H100", 80995, 5.0, "NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
    _gpu("H100-NVL", 95320, 5.5, "NVIDIA-H100-NVL"),
    _gpu("H200", 143156, 7.0, "NVIDIA-H200"),
    _gpu("B200", 182642, 10.0, "NVIDIA-B200"),
)
"""Memory is the least that `nvidia.com/gpu.memory` was seen to say (drivers differ by a few per cent)."""


def usable_bytes(gpu: GpuClass) -> int:
    """What a plan may fill."""
    return int((gpu.memory_mib * MIB - RESERVED_BYTES) * USABLE_SHARE)


def by_size(classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    """Smallest first, cheapest first among equals."""
    return tuple(sorted(classes, key=lambda gpu: (gpu.memory_mib, gpu.cost, gpu.name)))
