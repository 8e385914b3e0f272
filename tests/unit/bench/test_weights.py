"""Files that travel in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.weights import cut, model, take

CONTENT = bytes(range(256)) * 10


def test_parts_in_any_order_make_the_file_once_all_are_there(tmp_path: Path) -> None:
    parts = cut(CONTENT, tmp_path / "cut", 1000)
    taken = [take(part, tmp_path / "there") for part in reversed(parts)]
    assert taken == [None, None, CONTENT]


def test_another_file_is_not_taken_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pack them anew"):
        model(CONTENT, tmp_path)
