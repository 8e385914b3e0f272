"""What importing the trainer's libraries takes, by package. `python -m bench.imports` prints it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

LARGEST = 10
IMPORT = """
import os, sys
from qlora_trainer.libraries import NOT_USED, as_if_absent
from qlora_trainer.train import import_recipe
with as_if_absent(NOT_USED):
    import_recipe()
compiled = [vars(module).get("__cached__") for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
print(sum(path is not None and not os.path.exists(path) for path in compiled))
"""
LINE = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Imports:
    """Seconds by package, those of its own modules alone; Python's way of telling them takes time of its own."""

    seconds: dict[str, float]
    modules: int
    without_bytecode: int
    """Modules that are compiled anew at every start, since nothing could be written beside them."""

    @classmethod
    def measure(cls) -> Imports:
        """Import as `train` does, in a process of its own."""
        command = [sys.executable, "-X", "importtime", "-c", IMPORT]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return cls.of(ran.stderr, int(ran.stdout))

    @classmethod
    def of(cls, told: str, without_bytecode: int) -> Imports:
        """From what `-X importtime` tells: microseconds of each module, without and with what it imports."""
        spent: Counter[str] = Counter()
        lines = LINE.findall(told)
        for microseconds, module in lines:
            spent[module.partition(".")[0]] += int(microseconds)
        return cls({name: round(time / 1e6, 2) for name, time in spent.most_common()}, len(lines), without_bytecode)

    def table(self) -> str:
        """The largest, as Markdown."""
        largest = list(self.seconds.items())[:LARGEST]
        rest = sum(self.seconds.values()) - sum(seconds for _, seconds in largest)
        return "\n".join(
            [
                f"Imports of {self.modules} modules, {self.without_bytecode} of them without bytecode, under "
                "`-X importtime`:",
                "",
                f"| {' | '.join(name for name, _ in largest)} | others |",
                "|" + "---|" * (len(largest) + 1),
                f"| {' | '.join(f'{seconds:.2f}' for _, seconds in largest)} | {rest:.2f} |",
            ]
        )


if __name__ == "__main__":
    print(Imports.measure().table())
