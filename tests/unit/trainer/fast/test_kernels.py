"""Triton kernels against their plain equivalents, under Triton's interpreter; tests/gpu has them compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_trainer.fast import head_norm
from qlora_trainer.fast.nf4 import _dequantize
from tests.unit.trainer.fast.interpreted import PIECES

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in (".", "operator", "trainer_image")),
    }
    command = [sys.executable, "-m", "tests.unit.trainer.fast.interpreted"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("piece", PIECES)
def test_a_kernel_computes_what_its_plain_equivalent_does(errors: dict[str, float], piece: str) -> None:
    assert errors[piece] < 1e-6


@pytest.mark.parametrize("blocks_in_row", [0, 9, 64, 224])
def test_weights_are_written_sixteen_bytes_at_a_time(blocks_in_row: int) -> None:
    """Triton must see that all rows begin at such an address."""
    constants = {"NESTED": True, "NESTED_SIZE": 256, "SIZE": 64, "BLOCKS": 32, "IN_ROW": blocks_in_row}
    types = {"packed": "*u8", "absmax": "*u8", "out": "*bf16", "blocks": "i32", "out_row": "i32"}
    assert set(_stores(_dequantize, constants, types)) == {"st.global.v4.b32"}


@pytest.mark.parametrize("kernel", [head_norm._forward, head_norm._backward], ids=["forward", "backward"])
def test_heads_are_written_some_numbers_at_a_time(kernel: Any) -> None:
    narrow = dict.fromkeys(("source", "weight", "out", "grad"), "*bf16")
    numbers = {name: "i32" for name in kernel.arg_names if name not in (*narrow, "cos", "sin")} | {"eps": "fp32"}
    assert set(_stores(kernel, {"HEADS": 8, "HALF": 64}, narrow | numbers)) == {"st.global.v2.b32"}


def _stores(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> list[str]:
    """Instructions that write to memory, compiled for an H100, which need not be there."""
    names = kernel.arg_names
    even = [n for n, name in enumerate(names) if name not in constants and types.get(name) != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(number,): [["tt.divisibility", 16]] for number in even},
    )
    return re.findall(r"st\.global\.[\w.]+", compiled(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
