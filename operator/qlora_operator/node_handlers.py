"""kopf's side of nodes. A module of its own (`kopf run -m …`), since not every operator may look at nodes."""

from __future__ import annotations

from typing import Any

import kopf

from qlora_operator.node_gpus import NodeFacts, node_facts


@kopf.index("", "v1", "nodes", id="nodes")
def index_node(name: str, body: kopf.Body, **_: Any) -> dict[str, NodeFacts]:
    """Nodes by name."""
    return {name: node_facts(body)}


@kopf.on.event("", "v1", "nodes")
def node_event(name: str, memo: Any, **_: Any) -> None:
    """A job that no GPU was large enough for may fit now."""
    if memo.runtime.inventory.node_changed(name):
        memo.runtime.gpus_changed()
