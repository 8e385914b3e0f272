"""Real text that every Python brings: the help topics of its own documentation."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np


def rows(count: int, length: int, folder: Path | None) -> list[dict[str, Any]]:
    """Rows of `length` tokens, by the model's tokenizer in `folder`; as bytes where there is none.

    Where the text ends it begins again.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.array(_tokens(text, folder), np.int32)
    need = count * length
    ids = np.tile(ids, need // len(ids) + 1)[:need].reshape(count, length)
    return [{"input_ids": row, "labels": np.concatenate([[-100], row[1:]]).astype(np.int32)} for row in ids]


def _tokens(text: str, folder: Path | None) -> list[int]:
    if folder is None:
        return list(text.encode())
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]  # type: ignore[no-any-return]
