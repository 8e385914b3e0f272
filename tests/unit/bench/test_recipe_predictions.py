"""A measured recipe is held against the memory of the cut that it ran in."""

from __future__ import annotations

from typing import Any

import pytest

from bench.recipes.predictions import planned
from qlora_vram.memory import peak

R1: dict[str, Any] = {
    "recipe": "r1", "lengths": "full", "steps": 30, "microBatch": 4, "accumulation": 1, "checkpointed": 32,
    "computeType": "float16", "precision": "fp16", "path": "fast",
}  # fmt: skip


@pytest.mark.parametrize(("said", "cached"), [({}, False), ({"cached": False}, False), ({"cached": True}, True)])
def test_weights_were_cached_where_the_run_says_so(said: dict[str, bool], cached: bool) -> None:
    """Runs from before there was a cache don't say, whatever would be planned for them now."""
    components = peak(planned({**R1, **said})).components
    assert ("weightCache" in components, "dequantization" in components) == (cached, not cached)
