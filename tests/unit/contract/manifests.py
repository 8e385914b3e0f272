"""Manifests for the contract's tests."""

from __future__ import annotations

import copy
from typing import Any

MINIMAL_SPEC = {
    "model": {"uri": "hf://org/model"},
    "dataset": {"uri": "hf://org/data"},
    "output": {"uri": "s3://bucket/runs"},
}
REMOVE = object()
"""Value that takes a field away."""


def manifest(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The smallest valid manifest, with `changes` by dotted path: {"spec.lora.rank": 8}."""
    obj: dict[str, Any] = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "job"},
        "spec": copy.deepcopy(MINIMAL_SPEC),
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        node = obj
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is REMOVE:
            del node[last]
        else:
            node[last] = copy.deepcopy(value)
    return obj
