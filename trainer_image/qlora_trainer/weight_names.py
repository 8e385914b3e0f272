"""Which tensors a model's files hold, as far as little tells that is soon read: an index, or the head of a file.

Without torch: train asks transformers itself (`rehearsal`), when a GPU has been taken.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

HEAD_LIMIT = 100_000_000
"""Bytes that the head of a safetensors file has at most, as the format says."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class BrokenFileError(ValueError):
    """A file isn't what its name says, or isn't whole. The message names it."""


def names_in_index(index: Path) -> dict[str, str]:
    """The file of each tensor, of a `….index.json`. Raises BrokenFileError."""
    try:
        files: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise BrokenFileError(f"{index.name} isn't an index of weights") from None
    return files


def names_in_file(name: str, size: int, start: Callable[[int], bytes]) -> set[str]:
    """The tensors of a safetensors file, whose end must be there. Raises BrokenFileError.

    `start` gives so many of its bytes, from the first on. A hub may not tell its size, which is 0 then.
    """
    first = start(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > (min(size - 8, HEAD_LIMIT) if size else HEAD_LIMIT):
        raise BrokenFileError(f"{name} is cut off, or isn't a safetensors file")
    head = start(8 + length)[8:]
    try:
        tensors: dict[str, Any] = json.loads(head)
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise BrokenFileError(f"{name} isn't a safetensors file") from None
    if size and 8 + length + end != size:
        raise BrokenFileError(f"{name} is cut off: it has {size} bytes, and its head tells of {8 + length + end}")
    return set(tensors)


def absent_layers(paths: Iterable[str], names: Collection[str]) -> list[str]:
    """The weights of linear layers that the files lack, although they have those of the same layer elsewhere.

    Where no place has them, the files may call them otherwise: transformers renames, ties and fuses.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        wanted[_NUMBER.sub("*", path)].append(f"{path}.weight")
    absent = []
    for weights in wanted.values():
        missing = [name for name in weights if name not in names and name.partition(".")[2] not in names]
        if len(missing) < len(weights):
            absent += missing
    return absent
