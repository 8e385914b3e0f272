"""The benchmark of imports."""

from __future__ import annotations

from bench.imports import Imports

TOLD = """
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch._C
import time:   2000000 |    2500000 | torch
import time:    500000 |     500000 |       peft.tuners.lora
"""


def test_time_is_counted_once_and_for_the_package() -> None:
    imports = Imports.of(TOLD + "torch warns: import time\n", without_bytecode=2)
    assert imports.seconds == {"torch": 2.0, "peft": 0.5}
    assert (imports.modules, imports.without_bytecode) == (3, 2)


def test_the_table_shows_the_largest_and_the_sum_of_all_others() -> None:
    told = "\n".join(f"import time: {number * 1_000_000} | 1 | package{number}" for number in range(1, 13))
    table = Imports.of(told, without_bytecode=0).table()
    assert "| package12 | package11 |" in table
    assert table.endswith("| 4.00 | 3.00 | 3.00 |")
