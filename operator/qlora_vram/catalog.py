"""Well-known models by their name on the hub, so that a plan can be made before anything is downloaded.

models.json holds, of each published config.json, the keys that facts follow from, and the size of its weight files
(their tensors; headers are some kilobytes more). Names that share weights' shapes and types share an entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_vram.facts import model_facts
from qlorajob.plan import ModelFacts

FILE = Path(__file__).with_name("models.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """A published model."""

    names: tuple[str, ...]
    """On the hub: organisation/model."""
    config: Mapping[str, Any]
    """The essential part of its config.json."""
    weight_bytes: int
    """Size of its weight files."""


def lookup(name: str) -> ModelFacts | None:
    """Facts of a model by its name on the hub, such as Qwen/Qwen2-7B; None if it isn't here. Case doesn't matter."""
    entry = find(name)
    return model_facts(entry.config, weight_bytes=entry.weight_bytes) if entry else None


def find(name: str) -> Entry | None:
    """The entry of a name."""
    return _by_name().get(name.casefold())


@cache
def entries() -> tuple[Entry, ...]:
    """The whole catalogue."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Entry(tuple(each["names"]), each["config"], each["weight_bytes"]) for each in content)


@cache
def _by_name() -> Mapping[str, Entry]:
    return {name.casefold(): entry for entry in entries() for name in entry.names}
