"""JSON in pieces: the same values as json.loads, each with its line, wherever the pieces are cut."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer import json_stream
from qlora_trainer.json_stream import BrokenJsonError, JsonStream

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
objects = st.dictionaries(st.text(max_size=5), scalars | st.lists(scalars, max_size=3), max_size=4)


@given(rows=st.lists(objects, max_size=6), indent=st.none() | st.integers(0, 2), chunk=st.integers(1, 40))
def test_a_list_is_read_item_by_item(rows: list[Any], indent: int | None, chunk: int) -> None:
    text = json.dumps(rows, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        stream = JsonStream(io.StringIO(text))
        items = list(stream.items())
    assert [value for _, value in items] == rows
    assert stream.peek() == ""
    assert all(text.splitlines()[line - 1].lstrip("[ ").startswith("{") for line, _ in items)


@given(rows=st.lists(objects, min_size=1, max_size=6), chunk=st.integers(1, 40))
def test_values_in_a_row_are_read_one_by_one(rows: list[Any], chunk: int) -> None:
    text = "\n".join(json.dumps(row) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        stream = JsonStream(io.StringIO(text))
        values = []
        while stream.peek():
            values.append(stream.value())
    assert values == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n {"a": x}]', 2),
        ('[{"a": 1}\n {"a": 2}]', 2),
        ('[{"a": 1},\n {"a":\n  "2}]', 3),
        ('[{"a": 1},\n', 2),
    ],
)
def test_a_broken_value_is_named_by_line(text: str, line: int) -> None:
    with pytest.raises(BrokenJsonError) as broken:
        list(JsonStream(io.StringIO(text)).items())
    assert broken.value.line == line


def test_a_broken_value_is_noticed_without_reading_on() -> None:
    """Else an error at the start of a large file would load all of it."""
    file = io.StringIO('[{"a": x}' + " " * (3 * json_stream.CHUNK))
    with pytest.raises(BrokenJsonError):
        list(JsonStream(file).items())
    assert file.tell() == json_stream.CHUNK
