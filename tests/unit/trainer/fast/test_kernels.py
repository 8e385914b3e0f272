"""Triton kernels against their plain equivalents, under Triton's interpreter; tests/gpu has them compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
