"""What a node says of its GPUs: GPU feature discovery's labels and the device plugin's resources → GPU classes. Pure.

Labels of a kind of device begin with the name of its resource: `nvidia.com/gpu.product`, and with the MIG strategy
`mixed` also `nvidia.com/mig-1g.10gb.product`. With `single`, `nvidia.com/gpu.*` describes the slices. Where GPUs are
shared, a product ends in -SHARED (unless the resource is renamed to `….shared`), and `….replicas` says by how many.
Whether the node is ready or may be scheduled on just now doesn't matter: its kind of GPU is in the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_vram.gpus import GPU_RESOURCE, KNOWN, GpuClass
from qlora_vram.recognition import LEAST_MIB, recognize

Raw = Mapping[str, Any]
SHARED_SUFFIX: Final = "-SHARED"
RENAMED_SUFFIX: Final = ".shared"
PRODUCT_LABEL: Final = re.compile(r"(nvidia\.com/(?:gpu|mig-.+))\.product")
PASSING_TAINTS: Final = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/", "ToBeDeletedBy")
"""They come and go with the node's health, and say nothing of who may use it."""


@dataclass(frozen=True, slots=True)
class Taint:
    """A taint that keeps pods away which don't tolerate it."""

    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What of a node matters here."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...]
    resources: Mapping[str, int]
    """Extended resources of NVIDIA devices, and how many there are."""

    @property
    def has_gpus(self) -> bool:
        """A device plugin or GPU feature discovery says so (of a DRA driver's devices a ResourceSlice tells)."""
        return bool(self.resources) or any(PRODUCT_LABEL.fullmatch(label) for label in self.labels)


def node_facts(raw: Raw) -> NodeFacts:
    """A Node's."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels: Mapping[str, str] = dict(metadata.get("labels") or {})
    counted = [*(status.get("capacity") or {}).items(), *(status.get("allocatable") or {}).items()]
    resources: dict[str, int] = {}
    for name, quantity in counted:
        if name.startswith("nvidia.com/") and str(quantity).isdecimal():
            resources[name] = max(resources.get(name, 0), int(quantity))
    taints = tuple(
        Taint(taint["key"], taint.get("value") or "", taint["effect"])
        for taint in spec.get("taints") or ()
        if taint["effect"] in ("NoSchedule", "NoExecute")
        and taint["key"] not in resources
        and taint["key"] != GPU_RESOURCE
        and not taint["key"].startswith(PASSING_TAINTS)
    )
    return NodeFacts(metadata["name"], labels, taints, resources)


def node_classes(
    node: NodeFacts, known: Sequence[GpuClass] = KNOWN, *, labels_suffice: bool = True
) -> Iterator[GpuClass]:
    """A class for each kind of device. With `labels_suffice`, also where the device plugin isn't up (yet)."""
    prefixes = [found[1] for label in node.labels if (found := PRODUCT_LABEL.fullmatch(label))]
    sliced = any(prefix != GPU_RESOURCE for prefix in prefixes)
    for prefix in sorted(prefixes):
        resource = prefix + RENAMED_SUFFIX if node.resources.get(prefix + RENAMED_SUFFIX) else prefix
        count = node.resources.get(resource, 0)
        # On a node with MIG slices the labels count every GPU, sliced ones too: there only the resource tells.
        if not count and labels_suffice and not (sliced and prefix == GPU_RESOURCE):
            count = _number(node.labels, f"{prefix}.count")
        found_class = _device_class(node.labels, prefix, resource, known) if count else None
        if found_class:
            alone = found_class.is_slice or found_class.node_labels
            yield found_class.model_copy(update={"gpus_per_node": 1 if alone else count})


def _device_class(labels: Mapping[str, str], prefix: str, resource: str, known: Sequence[GpuClass]) -> GpuClass | None:
    product = labels[f"{prefix}.product"]
    capability = _capability(labels)
    gpu = recognize(product.removesuffix(SHARED_SUFFIX), _number(labels, f"{prefix}.memory"), capability, known)
    if gpu is None:
        return None
    gpu = gpu.model_copy(update={"resource": resource, "products": (product,)})
    replicas = _number(labels, f"{prefix}.replicas")
    return _share(gpu, replicas, f"{prefix}.replicas") if replicas > 1 else gpu


def _share(gpu: GpuClass, replicas: int, label: str) -> GpuClass | None:
    """A fair share of a GPU that several pods use at once: nothing keeps them from using more than theirs."""
    memory_mib = gpu.memory_mib // replicas
    if memory_mib < LEAST_MIB:
        return None
    return gpu.model_copy(
        update={
            "name": f"{gpu.name[:48]}-shared-{replicas}",
            "memory_mib": memory_mib,
            "tflops": gpu.tflops / replicas,
            "bandwidth_gbs": gpu.bandwidth_gbs / replicas,
            "cost": gpu.cost / replicas,
            "node_labels": {label: str(replicas)},
        }
    )


def _capability(labels: Mapping[str, str]) -> float | None:
    major, minor = _number(labels, "nvidia.com/gpu.compute.major"), _number(labels, "nvidia.com/gpu.compute.minor")
    return major + minor / 10 if major else None


def _number(labels: Mapping[str, str], key: str) -> int:
    """A label's number; 0 where it isn't one."""
    value = labels.get(key, "")
    return int(value) if value.isdecimal() else 0
