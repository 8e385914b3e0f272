"""Tests that need a GPU; without one they are skipped."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
