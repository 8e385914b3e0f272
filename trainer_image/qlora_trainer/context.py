"""What every command gets, and what it leaves for the report."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from qlora_trainer.settings import Settings
from qlora_trainer.signals import StopSignal
from qlorajob.errors import Reason
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import Artifacts, MemoryStatus, Prepared, Progress

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outcome:
    """What is known so far. It goes into the RunReport however the command ends, so that no failure hides progress."""

    reason: Reason = Reason.SUCCEEDED
    message: str = ""
    prepared: Prepared | None = None
    progress: Progress | None = None
    memory: MemoryStatus | None = None
    artifacts: Artifacts | None = None
    promoted: bool | None = None
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Log something that went wrong and was got over, and tell it in the report."""
        logger.warning(message)
        self.warnings.append(message)


@dataclass(frozen=True, slots=True)
class Context:
    """Settings in, outcome out, and whether somebody asked us to stop."""

    settings: Settings
    stop: StopSignal
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def spec(self) -> QLoRAJobSpec:
        """The manifest's spec."""
        return self.settings.spec
