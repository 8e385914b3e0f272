"""Nodes and ResourceSlices as GPU feature discovery, the device plugin and the DRA driver would write them.

Label sets are those of GPU feature discovery (k8s-device-plugin), attributes those of k8s-dra-driver-gpu.
"""

from __future__ import annotations

import time
from typing import Any

from qlora_operator.dra_gpus import slice_facts
from qlora_operator.fleet import Fleet, survey
from qlora_operator.node_gpus import node_facts
from qlora_vram.gpus import GpuClass

Json = dict[str, Any]

SIMULATED: Json = {"key": "qlora.dev/simulated", "effect": "NoSchedule"}
"""Taint of every node that isn't there: only pods that ask for it go to one."""
TOLERATION: Json = {"key": "qlora.dev/simulated", "operator": "Exists", "effect": "NoSchedule"}

CAPABILITY = {
    "Tesla-T4": "7.5",
    "NVIDIA-A10": "8.6",
    "NVIDIA-L4": "8.9",
    "NVIDIA-A100-SXM4-40GB": "8.0",
    "NVIDIA-A100-SXM4-80GB": "8.0",
    "NVIDIA-H100-80GB-HBM3": "9.0",
    "NVIDIA-GeForce-RTX-3060": "8.6",
    "Tesla-P100-PCIE-16GB": "6.0",
}
MEMORY = {
    "Tesla-T4": 15360,
    "NVIDIA-A10": 23028,
    "NVIDIA-L4": 23034,
    "NVIDIA-A100-SXM4-40GB": 40960,
    "NVIDIA-A100-SXM4-80GB": 81920,
    "NVIDIA-H100-80GB-HBM3": 81559,
    "NVIDIA-GeForce-RTX-3060": 12288,
    "Tesla-P100-PCIE-16GB": 16384,
}
"""What nvidia.com/gpu.memory says with a current driver."""


def labels(product: str, count: int = 1, prefix: str = "nvidia.com/gpu", **others: Any) -> dict[str, str]:
    """Of one kind of device; `others` replaces or adds labels below the prefix."""
    found = {"product": product, "count": count, "replicas": 1, "sharing-strategy": "none"} | others
    found = {"memory": MEMORY.get(product, 0)} | found
    return {f"{prefix}.{name}": str(value) for name, value in found.items()}


def compute(product: str) -> dict[str, str]:
    """Labels of the CUDA compute capability."""
    major, minor = CAPABILITY[product].split(".")
    return {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor}


def node(name: str, found: dict[str, str], resources: dict[str, int], *taints: Json, **extra: str) -> Json:
    """A Ready Node of a large machine; `resources` are the device plugin's."""
    counted = {"cpu": "96", "memory": "1000Gi", "ephemeral-storage": "4000Gi", "pods": "110"}
    counted |= {resource: str(count) for resource, count in resources.items()}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "Simulated", "message": "it isn't there"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | found | extra},
        "spec": {"taints": list(taints)},
        "status": {
            "capacity": counted,
            "allocatable": counted,
            "conditions": [ready | {"lastHeartbeatTime": now, "lastTransitionTime": now}],
        },
    }


def whole(name: str, product: str, count: int = 1, *taints: Json, **extra: str) -> Json:
    """A node with whole GPUs."""
    return node(name, labels(product, count) | compute(product), {"nvidia.com/gpu": count}, *taints, **extra)


def shared(name: str, product: str, replicas: int, count: int, *taints: Json, **extra: str) -> Json:
    """A node whose GPUs are time-sliced."""
    said = labels(f"{product}-SHARED", count, memory=MEMORY[product], replicas=replicas) | compute(product)
    said |= {"nvidia.com/gpu.sharing-strategy": "time-slicing"}
    return node(name, said, {"nvidia.com/gpu": replicas * count}, *taints, **extra)


def mig_single(name: str, product: str, profile: str, mib: int, count: int, *taints: Json, **extra: str) -> Json:
    """A node with equal slices, which look like GPUs."""
    said = labels(f"{product}-MIG-{profile}", count, memory=mib) | compute(product)
    return node(name, said | {"nvidia.com/mig.strategy": "single"}, {"nvidia.com/gpu": count}, *taints, **extra)


def mig_mixed(
    name: str, product: str, slices: dict[str, tuple[int, int]], gpus: int, *taints: Json, **extra: str
) -> Json:
    """A node with slices (profile → MiB, count) beside `gpus` whole GPUs; the labels count the sliced one too."""
    found = labels(product, gpus + 1) | compute(product) | {"nvidia.com/mig.strategy": "mixed"}
    resources = {"nvidia.com/gpu": gpus}
    for profile, (mib, count) in slices.items():
        resource = f"nvidia.com/mig-{profile}"
        found |= labels(f"{product}-MIG-{profile}", count, prefix=resource, memory=mib)
        resources[resource] = count
    return node(name, found, resources, *taints, **extra)


def device(name: str, product: str, mib: int, capability: str, profile: str = "") -> Json:
    """A device of a ResourceSlice."""
    attributes: Json = {
        "type": {"string": "mig" if profile else "gpu"},
        "productName": {"string": product},
        "cudaComputeCapability": {"version": f"{capability}.0"},
        "architecture": {"string": "Simulated"},
    }
    if profile:
        attributes["profile"] = {"string": profile}
    return {"name": name, "attributes": attributes, "capacity": {"memory": {"value": f"{mib}Mi"}}}


def resource_slice(node_name: str, *devices: Json) -> Json:
    """What the DRA driver publishes for one node."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node_name}-gpu.nvidia.com"},
        "spec": {
            "driver": "gpu.nvidia.com",
            "nodeName": node_name,
            "pool": {"name": node_name, "generation": 1, "resourceSliceCount": 1},
            "devices": list(devices),
        },
    }


def device_class(kind: str) -> Json:
    """As the DRA driver's chart installs it."""
    expression = f"device.driver == 'gpu.nvidia.com' && device.attributes['gpu.nvidia.com'].type == '{kind}'"
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": f"{kind}.nvidia.com"},
        "spec": {"selectors": [{"cel": {"expression": expression}}]},
    }


def fleet(*objects: Json, values: tuple[GpuClass, ...] = ()) -> Fleet:
    """What the operator makes of Nodes and ResourceSlices (of others it makes nothing)."""
    nodes = [node_facts(raw) for raw in objects if raw["kind"] == "Node"]
    slices = [facts for raw in objects if raw["kind"] == "ResourceSlice" and (facts := slice_facts(raw))]
    return survey(nodes, slices, values)
