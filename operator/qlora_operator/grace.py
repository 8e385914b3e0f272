"""How long a training pod that is asked to stop may take: the rest of a step, and two uploads of a checkpoint. Pure.

Two, since one may be under way when the signal comes, and the last one follows it.
"""

from __future__ import annotations

import math
from typing import Final

from qlorajob.plan import Plan
from qlorajob.status import Progress

SLOWEST_BYTES_A_SECOND: Final = 10_000_000
"""Assumed of S3 until an upload was measured."""
REST_SECONDS: Final = 60
"""The checkpoint is written to disk and read again, and the process ends."""
MAX_SECONDS: Final = 1800
"""Who drains a node waits no longer than this; a run then goes on from the checkpoint before."""
CHECKPOINT_PARTS: Final = ("adapter", "optimizer")
"""Components of a plan's prediction that a checkpoint holds: float32 weights, and the optimizer's states."""


def grace_seconds(least: int, planned: Plan, progress: Progress | None) -> int:
    """terminationGracePeriodSeconds of the next training pod: from the last measured upload, else from the plan.

    At least `least`, the administrator's setting, even where that is more than MAX_SECONDS.
    """
    saved = progress.checkpoint if progress else None
    upload = saved.seconds if saved else expected_bytes(planned) / SLOWEST_BYTES_A_SECOND
    needed = math.ceil(2 * upload + _step_seconds(progress)) + REST_SECONDS
    return max(least, min(needed, MAX_SECONDS))


def expected_bytes(planned: Plan) -> int:
    """Size of a checkpoint. On the CPU, gradients are counted too: they are one component with the adapter there."""
    return sum(planned.breakdown.get(part, 0) for part in CHECKPOINT_PARTS)


def _step_seconds(progress: Progress | None) -> float:
    """Of one optimizer step, as the trainer's own estimate of what is left says."""
    left = progress.total_steps - progress.step if progress else 0
    return progress.eta_seconds / left if progress and progress.eta_seconds and left > 0 else 0.0
