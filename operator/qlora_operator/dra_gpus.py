"""What ResourceSlices of NVIDIA's DRA driver say: devices → GPU classes that pods ask for by ResourceClaim. Pure.

Attributes and capacities are those that k8s-dra-driver-gpu publishes: `type` (gpu or mig), `productName`, `profile`,
`cudaComputeCapability`, and the capacity `memory`, which counts as the driver does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_vram.gpus import KNOWN, MIB, GpuClass
from qlora_vram.recognition import MIG_INFIX, product_label, recognize

Raw = Mapping[str, Any]
DRIVER: Final = "gpu.nvidia.com"
DEVICE_CLASSES: Final = {"gpu": "gpu.nvidia.com", "mig": "mig.nvidia.com"}
"""Type of a device → the DeviceClass that the driver's chart installs for it."""
SUFFIXES: Final = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One kind of device in a slice."""

    type: str
    product: str
    profile: str
    capability: float
    memory_mib: int


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """What of a ResourceSlice matters here."""

    name: str
    node: str
    devices: Mapping[DeviceFacts, int]
    """Each kind of device, and how many there are."""


def slice_facts(raw: Raw) -> SliceFacts | None:
    """A ResourceSlice's; None where it is another driver's or has no GPU."""
    spec = raw["spec"]
    if spec["driver"] != DRIVER:
        return None
    devices = Counter(facts for device in spec.get("devices") or () if (facts := _device(device)))
    return SliceFacts(raw["metadata"]["name"], spec.get("nodeName") or "", devices) if devices else None


def slice_classes(found: SliceFacts, known: Sequence[GpuClass] = KNOWN) -> Iterator[GpuClass]:
    """A class for each kind of device."""
    for device, count in found.devices.items():
        product = product_label(device.product)
        if device.profile:
            product += MIG_INFIX + device.profile
        gpu = recognize(product, device.memory_mib, device.capability, known)
        if gpu:
            yield gpu.model_copy(
                update={
                    "products": (product,),
                    "device_class": DEVICE_CLASSES[device.type],
                    "selector": _selector(device),
                    "gpus_per_node": count if device.type == "gpu" else 1,
                }
            )


def memory_selector(memory_mib: int) -> str:
    """CEL: a device with so much memory or more."""
    return f"device.capacity['{DRIVER}'].memory.compareTo(quantity('{memory_mib}Mi')) >= 0"


def _selector(device: DeviceFacts) -> str:
    attributes = {"productName": device.product} | ({"profile": device.profile} if device.profile else {})
    return " && ".join(f"device.attributes['{DRIVER}'].{name} == '{value}'" for name, value in attributes.items())


def _device(raw: Raw) -> DeviceFacts | None:
    attributes = {name.removeprefix(f"{DRIVER}/"): value for name, value in (raw.get("attributes") or {}).items()}
    capacity = {name.removeprefix(f"{DRIVER}/"): value for name, value in (raw.get("capacity") or {}).items()}
    kind = attributes.get("type", {}).get("string", "")
    if kind not in DEVICE_CLASSES or "memory" not in capacity or "productName" not in attributes:
        return None
    version = attributes.get("cudaComputeCapability", {}).get("version", "0.0.0")
    major, minor, *_ = (int(part) for part in version.split("."))
    return DeviceFacts(
        type=kind,
        product=attributes["productName"]["string"],
        profile=attributes.get("profile", {}).get("string", ""),
        capability=major + minor / 10,
        memory_mib=_bytes(capacity["memory"]["value"]) // MIB,
    )


def _bytes(quantity: str) -> int:
    """A Kubernetes quantity of memory."""
    for suffix, factor in SUFFIXES.items():
        if quantity.endswith(suffix):
            return int(float(quantity.removesuffix(suffix)) * factor)
    return int(float(quantity))
