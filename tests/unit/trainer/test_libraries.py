"""What importing Hugging Face's libraries costs a step, and that they work all the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qlora_trainer.libraries import _compile_at_first_call

IMPORT = """
import sys
from qlora_trainer.libraries import import_bitsandbytes
import_bitsandbytes()
print("torch._inductor.compile_fx" in sys.modules)
"""


class Compiler:
    """Stands for torch.compile, and notes what it was asked for."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.compiled.append((function.__name__, options))
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))


def add(a: int, b: int) -> int:
    return a + b


def test_bitsandbytes_is_imported_without_torch_s_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_a_function_is_compiled_once_when_it_is_called_first(options: dict[str, Any]) -> None:
    compiler = Compiler()
    decorator = partial(_compile_at_first_call, compiler)
    function = decorator(**options)(add) if options else decorator(add)
    assert (function.__name__, compiler.compiled) == ("add", [])
    assert [function(1, b=2), function(3, 4)] == [("compiled", 3), ("compiled", 7)]
    assert compiler.compiled == [("add", options)]
