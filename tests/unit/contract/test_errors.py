"""Words for errors."""

from __future__ import annotations

import pytest

from qlorajob.errors import first_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("\n one thing\nand more"), "one thing"),
        (KeyError(), "KeyError"),
        (OSError(" \n"), "OSError"),
        (ValueError("x" * 900), "x" * 500),
    ],
)
def test_an_error_is_told_in_one_line_and_never_in_none(error: Exception, words: str) -> None:
    assert first_line(error) == words
