"""The cluster's GPUs as kopf's indexes of nodes and ResourceSlices tell them. Surveyed anew only when they changed.

A node's status is written every few minutes, and on a large cluster that is often: what doesn't concern its GPUs costs
one comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_operator.config import OperatorConfig
from qlora_operator.dra_gpus import SliceFacts
from qlora_operator.fleet import Fleet, survey
from qlora_operator.node_gpus import NodeFacts

NodeIndex = Mapping[str, Iterable[NodeFacts]]
SliceIndex = Mapping[str, Iterable[SliceFacts]]


class Inventory:
    """Facts by the name of the node or ResourceSlice. Both indexes are empty where the operator may not look."""

    def __init__(self, nodes: NodeIndex, slices: SliceIndex, config: OperatorConfig) -> None:
        self._nodes, self._slices = nodes, slices
        self._config = config
        self._seen: dict[tuple[str, str], NodeFacts | SliceFacts | None] = {}
        self._fleet: Fleet | None = None

    def fleet(self) -> Fleet:
        """What there is now."""
        if self._fleet is None:
            nodes = [facts for name in list(self._nodes) for facts in self._nodes[name]]
            slices = [facts for name in list(self._slices) for facts in self._slices[name]]
            self._fleet = survey(nodes, slices, self._config.gpu_classes, self._config.minimum_compute_capability)
        return self._fleet

    def node_changed(self, name: str) -> bool:
        """Whether the node's GPUs, or who may use them, aren't what they were at the last call."""
        facts, before = _only(self._nodes, name), self._seen.get(("node", name))
        changed = self._changed(("node", name), facts)
        # Of which nodes ResourceSlices tell, nobody has to know here.
        return changed and (len(self._slices) > 0 or _has_gpus(facts) or _has_gpus(before))

    def slice_changed(self, name: str) -> bool:
        """Whether the ResourceSlice's GPUs aren't what they were at the last call."""
        return self._changed(("slice", name), _only(self._slices, name))

    def _changed(self, key: tuple[str, str], facts: NodeFacts | SliceFacts | None) -> bool:
        if self._seen.get(key) == facts:
            return False
        self._seen[key] = facts
        if facts is None:
            del self._seen[key]
        self._fleet = None
        return True


def _only(index: Mapping[str, Iterable[Any]], name: str) -> Any:
    return next(iter(index[name]), None) if name in index else None


def _has_gpus(facts: object) -> bool:
    return isinstance(facts, NodeFacts) and facts.has_gpus
