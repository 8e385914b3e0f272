"""JSON values out of a text of any size, one at a time, each with its line.

Public parsers either read the whole file first or don't say on which line a broken record stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

CHUNK = 1 << 18
"""Characters that are read at once."""
LONGEST_WORD = 16
"""No number, literal or escape that is cut off at the end of what was read makes an error further from it."""
SPACE = re.compile(r"[ \t\n\r]*")


class BrokenJsonError(ValueError):
    """The text isn't JSON; `line` says where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class JsonStream:
    """A position in a JSON text."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0
        self.line = 1

    def peek(self) -> str:
        """The next character that isn't white space; "" at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def value(self) -> tuple[int, Any]:
        """The next value, and the line on which it starts. Raises BrokenJsonError."""
        self.peek()
        line = self.line
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut_off(error) and self._read()):
                    lines = self._text.count("\n", self._at, error.pos)
                    raise BrokenJsonError(error.msg, line + lines) from None
            except RecursionError:
                raise BrokenJsonError("lists and objects are nested too deeply", line) from None
            except ValueError as error:  # an integer of thousands of digits
                raise BrokenJsonError(str(error), line) from None
            else:
                self._advance(end)
                return line, value

    def items(self) -> Iterator[tuple[int, Any]]:
        """The items of the list that starts here, each with its line. Raises BrokenJsonError."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self.peek() != ",":
                self._take("]")
                return
            self._take(",")

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise BrokenJsonError(f"Expecting {character!r}", self.line)
        self._advance(self._at + 1)

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self) -> bool:
        """Read on, at least as much as is pending, so that a long value isn't parsed from its start too often."""
        pending = self._text[self._at :]
        more = self._file.read(max(CHUNK, len(pending)))
        self._text, self._at = pending + more, 0
        return bool(more)

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - LONGEST_WORD
