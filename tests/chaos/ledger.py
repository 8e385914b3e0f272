"""What a session of these tests has done to the cluster, and what that did to the results."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Counted over all cells."""

    faults: int = 0
    """That were injected."""
    lost: int = 0
    """Results that should be there and aren't, or aren't what they should be."""
    duplicated: int = 0
    """Results that were made more than once, or that nobody asked for."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Run id → SHA-256 of its weights: on a CPU no interruption changes a bit."""

    held: bool = False
    """Whether every cell that was run has passed."""

    def line(self) -> str:
        """The last line of `make test-chaos`."""
        return f"CHAOS OK faults={self.faults} lost={self.lost} duplicated={self.duplicated}"


LEDGER = Ledger()
