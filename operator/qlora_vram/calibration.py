"""What no physical term tells: constants that are fitted to measured peaks. They live in calibration.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Memory that the driver counts and no tensor holds."""

    context_bytes: int
    """CUDA context, kernels, and the workspaces of cuBLAS and bitsandbytes: there before the first weight."""
    slack_share: float
    """What the caching allocator holds beyond the tensors that come and go, as a share of these."""


@cache
def shipped() -> Calibration:
    """The constants that this version was fitted to."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return Calibration(context_bytes=found["contextBytes"], slack_share=found["slackShare"])
