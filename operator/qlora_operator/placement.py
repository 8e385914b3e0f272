"""How a training pod asks for its GPUs, and which nodes it may go to. Pure.

By extended resource (a GPU, a MIG slice, a share) with a required node affinity on the labels of the planned class; or,
where a DRA driver offers the devices, by a ResourceClaim that the cluster makes for each pod from a template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from qlora_operator.config import OperatorConfig
from qlora_operator.dra_gpus import memory_selector
from qlora_operator.fleet import Slot
from qlora_operator.node_gpus import RENAMED_SUFFIX
from qlora_vram.gpus import GPU_RESOURCE, GpuClass
from qlorajob.spec import QLoRAJobSpec

Manifest = dict[str, Any]

CLAIM: Final = "gpus"
"""Name of the claim in a pod, and of the request in a claim."""
GPU_MAJOR_LABEL: Final = "nvidia.com/gpu.compute.major"
MAJORS_WITHOUT_BF16: Final = ("3", "5", "6", "7")
LABEL_SPREAD: Final = 1.05
"""nvidia.com/gpu.memory of one kind of GPU differs by up to so much between drivers."""


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """A slot, and the name of the ResourceClaimTemplate where its class needs one."""

    slot: Slot
    template: str = ""

    @property
    def limits(self) -> dict[str, str]:
        """The container's extended resource."""
        return {} if self.template else {self.slot.gpu.resource: str(self.slot.count)}

    @property
    def claims(self) -> Manifest:
        """The container's use of the pod's claim."""
        return {"claims": [{"name": CLAIM}]} if self.template else {}


def placement(spec: QLoRAJobSpec, config: OperatorConfig, gpus: GpuRequest | None) -> Manifest:
    """Fields of the pod's spec that decide where it goes: what the user asks for, and what its GPUs ask for."""
    found: Manifest = {}
    tolerations = [toleration.to_wire() for toleration in spec.resources.tolerations]
    if gpus:
        tolerations += _gpu_tolerations(gpus.slot.gpu)
        if gpus.template:
            found["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": gpus.template}]
        else:
            terms = [{"matchExpressions": list(_node_requirements(gpus.slot))}]
            found["affinity"] = {
                "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
            }
        if config.runtime_class_name:
            found["runtimeClassName"] = config.runtime_class_name
    if tolerations:
        found["tolerations"] = tolerations
    if spec.resources.node_selector:
        found["nodeSelector"] = dict(spec.resources.node_selector)
    if spec.priority_class_name:
        found["priorityClassName"] = spec.priority_class_name
    return found


def claim_spec(slot: Slot) -> Manifest:
    """A resource.k8s.io/v1 ResourceClaimSpec: so many devices of the class."""
    gpu = slot.gpu
    request = {
        "deviceClassName": gpu.device_class,
        "allocationMode": "ExactCount",
        "count": slot.count,
        "selectors": [{"cel": {"expression": gpu.selector or memory_selector(gpu.memory_mib)}}],
    }
    return {"devices": {"requests": [{"name": CLAIM, "exactly": request}]}}


def _gpu_tolerations(gpu: GpuClass) -> Iterator[Manifest]:
    """Of the taints that keep pods without a GPU away from GPU nodes."""
    for key in dict.fromkeys((GPU_RESOURCE, gpu.resource)):
        yield {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _node_requirements(slot: Slot) -> Iterator[Manifest]:
    """The class's own labels, or bounds of its memory where it has none."""
    gpu, prefix = slot.gpu, slot.gpu.resource.removesuffix(RENAMED_SUFFIX)
    pinned = bool(gpu.node_labels or (gpu.products and slot.exact))
    if gpu.products and slot.exact:
        yield {"key": f"{prefix}.product", "operator": "In", "values": list(gpu.products)}
    for key, value in gpu.node_labels.items():
        yield {"key": key, "operator": "In", "values": [value]}
    if not pinned:
        yield {"key": f"{prefix}.memory", "operator": "Gt", "values": [str(gpu.memory_mib - 1)]}
    if not pinned and slot.exact:
        yield {"key": f"{prefix}.memory", "operator": "Lt", "values": [str(int(gpu.memory_mib * LABEL_SPREAD) + 1)]}
    if not slot.exact and gpu.bf16:
        # NotIn also accepts nodes without the label, so that only what is known to lack bfloat16 is left out.
        yield {"key": GPU_MAJOR_LABEL, "operator": "NotIn", "values": list(MAJORS_WITHOUT_BF16)}
