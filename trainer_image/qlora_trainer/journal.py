"""What a run has found out so far. It travels in the checkpoints, so that a resumed run reports all of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "qlora_journal.json"


@dataclass(slots=True)
class Journal:
    """Facts that can't be measured again after a restart, or not for free."""

    base_eval_loss: float | None = None
    base_answers: list[str] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    train_seconds: float = 0.0
    train_tokens: int = 0
    resumed_at: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    """Of the processes before this one."""

    @property
    def last_evaluation(self) -> int | None:
        """Step of the last validation."""
        return self.evaluations[-1]["step"] if self.evaluations else None

    @classmethod
    def load(cls, folder: Path) -> Journal | None:
        """The journal in a checkpoint, if it has one that can be read."""
        try:
            return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
