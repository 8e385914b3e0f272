"""The GPU classes that a job can get: those that nodes, ResourceSlices and the chart's values tell of. Pure.

Where nothing tells anything, the shipped table stands in, and a pod then takes any GPU that is as large as planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from qlora_operator.dra_gpus import SliceFacts, slice_classes
from qlora_operator.node_gpus import RENAMED_SUFFIX, NodeFacts, Taint, node_classes
from qlora_vram.gpus import GPU_RESOURCE, KNOWN, MINIMUM_CAPABILITY, SHIPPED, GpuClass, by_size
from qlora_vram.recognition import complete
from qlorajob.spec import ResourcesSpec, Toleration


@dataclass(frozen=True, slots=True)
class Machine:
    """A node's GPUs, and what a pod needs to get there."""

    classes: tuple[GpuClass, ...]
    node: NodeFacts | None = None
    """None where only a ResourceSlice tells of it."""

    def serves(self, resources: ResourcesSpec) -> bool:
        """Labels and taints let a pod with this nodeSelector and these tolerations in."""
        if self.node is None:
            return True
        labels = self.node.labels
        selected = all(labels.get(key) == value for key, value in resources.node_selector.items())
        return selected and all(
            any(_tolerates(toleration, taint) for toleration in resources.tolerations) for taint in self.node.taints
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """The GPUs of one training pod."""

    gpu: GpuClass
    count: int
    exact: bool = True
    """Of this very class; otherwise any that is at least as large."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Everything that is known of the cluster's GPUs."""

    machines: tuple[Machine, ...] = ()
    values: tuple[GpuClass, ...] = ()
    """The administrator's classes; they win over others of their name."""
    minimum_capability: float = MINIMUM_CAPABILITY
    """Older GPUs aren't offered: the trainer's image can't use them."""

    @property
    def known(self) -> bool:
        """Somebody has told something of the cluster."""
        return bool(self.machines or self.values)

    def classes(self, resources: ResourcesSpec | None = None) -> tuple[GpuClass, ...]:
        """Classes that a pod with `resources` can get, smallest first; all of the cluster's without."""
        if not self.known:
            return SHIPPED
        machines = [machine for machine in self.machines if resources is None or machine.serves(resources)]
        found = _merge(self.values, (gpu for machine in machines for gpu in machine.classes))
        return by_size([gpu for gpu in found if gpu.compute_capability >= self.minimum_capability])

    def slot(self, name: str, count: int, resources: ResourcesSpec) -> Slot | None:
        """`count` GPUs of the class `name`, for a pod; None where there is no such class (gpuClass cpu)."""
        gpu = next((gpu for gpu in self.classes(resources) if gpu.name == name), None)
        if gpu is None or not count:
            return None
        return Slot(gpu, count, exact=self.known or resources.gpu_class != "auto")


def survey(
    nodes: Iterable[NodeFacts],
    slices: Iterable[SliceFacts],
    values: Iterable[GpuClass] = (),
    minimum_capability: float = MINIMUM_CAPABILITY,
) -> Fleet:
    """The fleet. On a node with both a device plugin and a DRA driver, the device plugin counts."""
    values = tuple(values)
    known = (*map(complete, values), *KNOWN)
    slices = tuple(slices)
    sliced = {found.node for found in slices if found.node}
    nodes = tuple(nodes)
    machines = [
        Machine(tuple(node_classes(node, known, labels_suffice=node.name not in sliced)), node) for node in nodes
    ]
    by_name = {machine.node.name: machine for machine in machines if machine.node}
    plugged = {name for name, machine in by_name.items() if machine.classes}
    for found in slices:
        if found.node not in plugged:
            machine = by_name.get(found.node)
            machines.append(Machine(tuple(slice_classes(found, known)), machine.node if machine else None))
    return Fleet(tuple(machine for machine in machines if machine.classes), values, minimum_capability)


KINDS: Final = ("", "-renamed", "-single", "-dra")
"""What tells classes of one name apart: how pods ask for them. The first that there is keeps the bare name."""


def _kind(gpu: GpuClass) -> str:
    if gpu.device_class:
        return "-dra"
    if gpu.resource.endswith(RENAMED_SUFFIX):
        return "-renamed"
    return "-single" if gpu.is_slice and gpu.resource == GPU_RESOURCE else ""


def _merge(values: Iterable[GpuClass], found: Iterable[GpuClass]) -> Iterator[GpuClass]:
    """One class for each name and way to ask for it. What the administrator says of a class stays as it is."""
    merged: dict[tuple[str, str], GpuClass] = {}
    for gpu in found:
        key = (gpu.name, _kind(gpu))
        merged[key] = _joined(merged[key], gpu) if key in merged else gpu
    names = set()
    for said in values:
        names.add(said.name)
        seen = [gpu.gpus_per_node for (name, _), gpu in merged.items() if name == said.name]
        counted = {"gpus_per_node": max(seen)} if seen and "gpus_per_node" not in said.model_fields_set else {}
        yield complete(said.model_copy(update=counted))
    for (name, kind), gpu in merged.items():
        if name not in names:
            bare = kind == next(other for other in KINDS if (name, other) in merged)
            yield gpu if bare else gpu.model_copy(update={"name": name + kind})


def _joined(one: GpuClass, other: GpuClass) -> GpuClass:
    """What holds on every node of the class."""
    selectors = {selector: None for gpu in (one, other) if gpu.selector for selector in gpu.selector.split(" || ")}
    return one.model_copy(
        update={
            "memory_mib": min(one.memory_mib, other.memory_mib),
            "products": tuple(dict.fromkeys((*one.products, *other.products))),
            "gpus_per_node": max(one.gpus_per_node, other.gpus_per_node),
            "selector": " || ".join(selectors) or None,
        }
    )


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    """As the scheduler decides it."""
    if toleration.effect not in (None, taint.effect):
        return False
    if toleration.key is None:
        return True
    if toleration.key != taint.key:
        return False
    return toleration.operator == "Exists" or (toleration.value or "") == taint.value
