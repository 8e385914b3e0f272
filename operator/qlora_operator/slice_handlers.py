"""kopf's side of ResourceSlices. A module of its own (`kopf run -m …`), for clusters that serve resource.k8s.io/v1."""

from __future__ import annotations

from typing import Any

import kopf

from qlora_operator.dra_gpus import SliceFacts, slice_facts


@kopf.index("resource.k8s.io", "v1", "resourceslices", id="slices")
def index_slice(name: str, body: kopf.Body, **_: Any) -> dict[str, SliceFacts]:
    """Slices with GPUs by name."""
    facts = slice_facts(body)
    return {name: facts} if facts else {}


@kopf.on.event("resource.k8s.io", "v1", "resourceslices")
def slice_event(name: str, memo: Any, **_: Any) -> None:
    """A job that no GPU was large enough for may fit now."""
    if memo.runtime.inventory.slice_changed(name):
        memo.runtime.gpus_changed()
