"""Data may be larger than memory: what is read is dropped again before the next is read."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from qlora_trainer.batches import as_dataset
from qlora_trainer.corpus import Corpus, DocumentWriter
from qlora_trainer.data import load_data
from qlora_trainer.rows import read_file
from tests.unit.trainer.jobs import Job

MIB = 1 << 20
ROWS, ROW_BYTES = 4000, 5000
WANTED = 100
"""Every so-maniest row passes the filter: few enough that tokenising takes no time."""


def _rows() -> list[dict[str, str]]:
    return [
        {"text": f"{number} " + "x" * ROW_BYTES, "kind": "rare" if number % WANTED == 0 else "common"}
        for number in range(ROWS)
    ]


def _write(path: Path) -> None:
    if path.name == "rows.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "kind"])
            writer.writeheader()
            writer.writerows(_rows())
    elif path.name == "rows.json":
        path.write_text(json.dumps(_rows()))
    else:
        with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv"])
def test_memory_does_not_grow_with_the_file(job: Job, tokenizer: Any, name: str) -> None:
    path = job.folder / name
    _write(path)
    settings = job.change(dataset={"uri": f"file://{path}", "filter": {"kind": "rare"}, "validation": None}).settings()
    tracemalloc.start()
    try:
        data = load_data(settings, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data.train.documents) == ROWS // WANTED
    assert peak < 8 * MIB < ROWS * ROW_BYTES // 2


def test_memory_does_not_grow_with_the_row_group_of_a_parquet_file(tmp_path: Path) -> None:
    """pandas writes a million rows as one. Arrow's memory is its own, which tracemalloc doesn't see."""
    path = tmp_path / "rows.parquet"
    texts = [os.urandom(ROW_BYTES // 10).hex() for _ in range(5 * ROWS)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in read_file(path, path.name)]
    assert len(held) == 5 * ROWS
    assert max(held) < 8 * MIB < path.stat().st_size // 1.5


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    writer = DocumentWriter(tmp_path, seed=0)
    tokens = list(range(100))
    for _ in range(40_000):
        writer.add(tokens, tokens)
    corpus = Corpus(writer.finish()[0], [[number] for number in range(40_000)])
    tracemalloc.start()
    try:
        table = as_dataset(corpus, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table[39_999]["input_ids"] == tokens
    assert peak < 8 * MIB < corpus.tokens * 8 // 2
    assert list(tmp_path.iterdir()) == []
