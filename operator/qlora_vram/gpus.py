"""Kinds of GPUs: what a plan needs to know of each, and the table of the usual ones from T4 to B200. Pure.

Sources of the table: compute capability from NVIDIA's list of CUDA GPUs; dense 16-bit tensor throughput (with float32
accumulation; sparsity never counted) and memory bandwidth from NVIDIA's datasheets and architecture whitepapers; values
of `nvidia.com/gpu.product` are the names that NVML gives, as GPU feature discovery writes them. Memory is the least
that CUDA was seen to report (`torch.cuda.mem_get_info`), which is what a process runs out of: the node label
`nvidia.com/gpu.memory` says up to 3 % more since drivers of R510 and later count what they keep for themselves. MIG
memory is NVML's (`nvidia-smi mig -lgip`; go-nvml's simulated A30 and A100), rounded down for B200.
Costs are rough on-demand prices for an hour, L4 = 0.7: they only decide between classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import Field

from qlorajob.base import ContractModel

GIB: Final = 1024**3
MIB: Final = 1024**2
CPU: Final = "cpu"
"""resources.gpuClass for training without a GPU."""
GPU_RESOURCE: Final = "nvidia.com/gpu"
"""The extended resource of whole GPUs, and of the slices of nodes whose MIG strategy is `single`."""
MIG_RESOURCE_PREFIX: Final = "nvidia.com/mig-"
"""Extended resources of slices where the MIG strategy is `mixed`."""
USABLE_SHARE: Final = 0.97
"""The rest is a margin: for a prediction that is a little low, and for a driver that keeps a little more."""
BF16_CAPABILITY: Final = 8.0
MIG_PROFILE: Final = re.compile(r"(?P<compute>\d+)g\.(?P<gigabytes>\d+)gb")


class GpuClass(ContractModel):
    """A kind of GPU, or a slice of one, that the planner can choose."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=63)]
    """What users write into resources.gpuClass."""
    memory_mib: Annotated[int, Field(alias="memoryMiB", ge=1024)]
    """Memory that CUDA reports, in MiB; the node label nvidia.com/gpu.memory may say up to 3 % more."""
    products: tuple[str, ...] = ()
    """Values of the node label nvidia.com/gpu.product (of a slice: of its resource's own product label)."""
    compute_capability: Annotated[float, Field(ge=1)] = BF16_CAPABILITY
    """CUDA compute capability, such as 8.6."""
    tflops: Annotated[float, Field(ge=0)] = 0
    """Dense bf16 or fp16 tensor throughput in TFLOP/s; 0 where it isn't known."""
    bandwidth_gbs: Annotated[float, Field(alias="bandwidthGBs", ge=0)] = 0
    """Memory bandwidth in GB/s (10⁹ bytes); 0 where it isn't known."""
    cost: Annotated[float, Field(ge=0)] = 1.0
    """Relative price of one for an hour."""
    resource: Annotated[str, Field(min_length=1, max_length=253)] = GPU_RESOURCE
    """Extended resource that a container asks for; not used with a device class."""
    gpus_per_node: Annotated[int, Field(ge=1)] = 1
    """The most that one pod can have. 1 for slices and shared GPUs: they can't work together."""
    node_labels: Mapping[str, str] = {}
    """Labels of this class's nodes, where `products` isn't on them (autoscaled pools at zero, for example)."""
    device_class: Annotated[str, Field(max_length=253)] | None = None
    """DeviceClass of dynamic resource allocation; pods then ask by ResourceClaim."""
    selector: str | None = None
    """CEL expression on `device` that picks this class among the devices of `device_class`."""

    @property
    def bf16(self) -> bool:
        """It computes in bfloat16."""
        return self.compute_capability >= BF16_CAPABILITY

    @property
    def is_slice(self) -> bool:
        """A MIG slice, by the name of its resource or product."""
        return self.resource.startswith(MIG_RESOURCE_PREFIX) or any("-MIG-" in product for product in self.products)


def usable_bytes(gpu: GpuClass) -> int:
    """What a predicted peak may reach, the CUDA context and everything else that the driver counts included."""
    return int(gpu.memory_mib * MIB * USABLE_SHARE)


def by_size(classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    """Smallest first, cheapest first among equals."""
    return tuple(sorted(classes, key=lambda gpu: (gpu.memory_mib, gpu.cost, gpu.name)))


def _gpu(
    name: str, mib: int, capability: float, tflops: float, gbs: float, cost: float, per_node: int, *products: str
) -> GpuClass:
    return GpuClass(
        name=name,
        memory_mib=mib,
        compute_capability=capability,
        tflops=tflops,
        bandwidth_gbs=gbs,
        cost=cost,
        gpus_per_node=per_node,
        products=products,
    )


# fmt: off
WHOLE: Final[tuple[GpuClass, ...]] = (
    #    name                 MiB  CC    TFLOP/s  GB/s  cost  per node (what usual machines hold), products
    _gpu("P100",            16_270, 6.0,   18.7,  732,  0.5, 8, "Tesla-P100-PCIE-16GB", "Tesla-P100-SXM2-16GB"),
    _gpu("V100-16GB",       16_144, 7.0,    112,  900,  0.9, 8, "Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB"),
    _gpu("V100-32GB",       32_480, 7.0,    112,  900,  1.3, 8, "Tesla-V100-SXM2-32GB", "Tesla-V100-PCIE-32GB"),
    _gpu("RTX-2080-Ti",     10_820, 7.5,   53.8,  616,  0.3, 4, "NVIDIA-GeForce-RTX-2080-Ti", "GeForce-RTX-2080-Ti"),
    _gpu("T4",              14_910, 7.5,     65,  320,  0.4, 8, "Tesla-T4", "NVIDIA-T4"),
    _gpu("Quadro-RTX-6000", 22_500, 7.5,  130.5,  672,  0.8, 4, "Quadro-RTX-6000"),
    _gpu("Quadro-RTX-8000", 45_500, 7.5,  130.5,  672,  1.3, 4, "Quadro-RTX-8000"),
    _gpu("A100-40GB",       40_320, 8.0,    312, 1555,  2.0, 8,
         "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    _gpu("A100-80GB",       80_994, 8.0,    312, 1935,  3.0, 8,
         "NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe", "A100-SXM4-80GB", "NVIDIA-A800-SXM4-80GB",
         "NVIDIA-A800-80GB-PCIe"),
    _gpu("A30",             23_900, 8.0,    165,  933,  1.2, 8, "NVIDIA-A30"),
    _gpu("A2",              14_910, 8.6,     18,  200,  0.3, 4, "NVIDIA-A2"),
    _gpu("A10",             22_500, 8.6,    125,  600,  0.8, 8, "NVIDIA-A10"),
    _gpu("A10G",            22_500, 8.6,     70,  600,  0.8, 8, "NVIDIA-A10G"),
    _gpu("A40",             45_372, 8.6,    149,  696,  1.4, 8, "NVIDIA-A40"),
    _gpu("RTX-A4000",       15_900, 8.6,   76.7,  448,  0.4, 4, "NVIDIA-RTX-A4000"),
    _gpu("RTX-A5000",       24_100, 8.6,  111.1,  768,  0.7, 4, "NVIDIA-RTX-A5000"),
    _gpu("RTX-A6000",       48_530, 8.6,  154.8,  768,  1.4, 4, "NVIDIA-RTX-A6000"),
    _gpu("RTX-3060",        11_900, 8.6,   25.5,  360,  0.3, 4, "NVIDIA-GeForce-RTX-3060"),
    _gpu("RTX-3090",        24_120, 8.6,     71,  936,  0.6, 4, "NVIDIA-GeForce-RTX-3090"),
    _gpu("RTX-3090-Ti",     24_120, 8.6,     80, 1008,  0.7, 4, "NVIDIA-GeForce-RTX-3090-Ti"),
    _gpu("L4",              22_487, 8.9,    121,  300,  0.7, 8, "NVIDIA-L4"),
    _gpu("L40",             45_373, 8.9,    181,  864,  1.5, 8, "NVIDIA-L40"),
    _gpu("L40S",            45_373, 8.9,    362,  864,  1.6, 8, "NVIDIA-L40S"),
    _gpu("RTX-4060-Ti-16GB", 15_900, 8.9,  44.1,  288,  0.4, 4, "NVIDIA-GeForce-RTX-4060-Ti"),
    _gpu("RTX-4080",        15_900, 8.9,   97.5,  717,  0.6, 4,
         "NVIDIA-GeForce-RTX-4080", "NVIDIA-GeForce-RTX-4080-SUPER"),
    _gpu("RTX-4090",        24_080, 8.9,  165.2, 1008,  0.8, 4, "NVIDIA-GeForce-RTX-4090"),
    _gpu("RTX-6000-Ada",    48_500, 8.9,  364.2,  960,  1.6, 4, "NVIDIA-RTX-6000-Ada-Generation"),
    _gpu("H100",            80_995, 9.0,    989, 3350,  5.0, 8, "NVIDIA-H100-80GB-HBM3", "NVIDIA-H800"),
    _gpu("H100-PCIe",       80_995, 9.0,    756, 2000,  4.5, 8, "NVIDIA-H100-PCIe", "NVIDIA-H800-PCIe"),
    _gpu("H100-NVL",        95_320, 9.0,    835, 3900,  5.5, 8, "NVIDIA-H100-NVL"),
    _gpu("H20",             96_700, 9.0,    148, 4000,  3.5, 8, "NVIDIA-H20"),
    _gpu("GH200-96GB",      96_700, 9.0,    989, 4000,  5.5, 1, "NVIDIA-GH200-480GB"),
    _gpu("H200",           143_156, 9.0,    989, 4800,  7.0, 8, "NVIDIA-H200"),
    _gpu("H200-NVL",       142_000, 9.0,    835, 4800,  6.5, 8, "NVIDIA-H200-NVL"),
    _gpu("B200",           182_642, 10.0,  2250, 7700, 10.0, 8, "NVIDIA-B200"),
    _gpu("GB200",          188_000, 10.0,  2450, 8000, 11.0, 4, "NVIDIA-GB200"),
    _gpu("B300",           273_000, 10.3,  2250, 8000, 13.0, 8, "NVIDIA-B300-SXM6-AC", "NVIDIA-B300"),
    _gpu("RTX-5060-Ti-16GB", 15_800, 12.0, 47.4,  448,  0.4, 4, "NVIDIA-GeForce-RTX-5060-Ti"),
    _gpu("RTX-5080",        15_800, 12.0, 112.6,  960,  0.7, 4, "NVIDIA-GeForce-RTX-5080"),
    _gpu("RTX-5090",        32_089, 12.0, 209.5, 1792,  1.0, 4, "NVIDIA-GeForce-RTX-5090"),
    _gpu("RTX-PRO-6000",    96_900, 12.0, 503.8, 1597,  2.5, 8,
         "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition", "NVIDIA-RTX-PRO-6000-Blackwell-Workstation-Edition",
         "NVIDIA-RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition"),
)
MIG_MEMORY_MIB: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType({
    "A30": {"1g.6gb": 5_836, "2g.12gb": 11_672},
    "A100-40GB": {"1g.5gb": 4_864, "1g.10gb": 9_856, "2g.10gb": 9_856, "3g.20gb": 19_968, "4g.20gb": 19_968},
    "A100-80GB": {"1g.10gb": 9_728, "1g.20gb": 19_968, "2g.20gb": 19_968, "3g.40gb": 40_192, "4g.40gb": 40_192},
    "H100": {"1g.10gb": 9_984, "1g.20gb": 20_096, "2g.20gb": 20_096, "3g.40gb": 40_448, "4g.40gb": 40_448},
    "H200": {"1g.18gb": 16_384, "1g.35gb": 33_280, "2g.35gb": 33_280, "3g.71gb": 71_424, "4g.71gb": 71_424},
    "B200": {"1g.23gb": 22_000, "1g.45gb": 45_000, "2g.45gb": 45_000, "3g.90gb": 90_000, "4g.90gb": 90_000},
})
"""Class of the whole GPU → profile → memory of a slice in MiB."""
# fmt: on


def mig_slice(gpu: GpuClass, profile: str, memory_mib: int) -> GpuClass:
    """The class of one slice of `gpu`, such as 1g.10gb, under the `mixed` strategy.

    Throughput goes with the compute slices (of 7; an A30 has 4), bandwidth with the memory, price with the larger.
    Raises ValueError where `profile` isn't one.
    """
    found = MIG_PROFILE.match(profile)
    if found is None:
        raise ValueError(f"{profile} is no MIG profile")
    compute = min(1.0, int(found["compute"]) / (4 if gpu.name == "A30" else 7))
    memory = min(1.0, memory_mib / gpu.memory_mib)
    return gpu.model_copy(
        update={
            "name": f"{gpu.name}-{profile}",
            "memory_mib": memory_mib,
            "products": tuple(f"{product}-MIG-{profile}" for product in gpu.products),
            "tflops": round(gpu.tflops * compute, 1),
            "bandwidth_gbs": round(gpu.bandwidth_gbs * memory),
            "cost": round(gpu.cost * max(compute, memory), 2),
            "resource": MIG_RESOURCE_PREFIX + profile,
            "gpus_per_node": 1,
        }
    )


def _slices() -> Iterator[GpuClass]:
    for gpu in WHOLE:
        for profile, memory_mib in MIG_MEMORY_MIB.get(gpu.name, {}).items():
            yield mig_slice(gpu, profile, memory_mib)


MINIMUM_CAPABILITY: Final = 7.5
"""What the trainer image's torch is compiled for: CUDA 13 ended with Volta."""
SLICES: Final = tuple(_slices())
"""MIG slices: only for clusters that are known to have them."""
KNOWN: Final = WHOLE + SLICES
"""Everything that a name, or a node's label, can stand for."""
SHIPPED: Final = tuple(gpu for gpu in WHOLE if gpu.compute_capability >= MINIMUM_CAPABILITY)
"""What the planner chooses from where it knows nothing of the cluster: whole GPUs that the trainer's image can use."""
