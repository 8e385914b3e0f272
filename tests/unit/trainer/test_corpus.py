"""Documents on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_trainer.corpus import Corpus, DocumentWriter

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tokens, max_size=8), st.data())
def test_documents_come_back_as_they_were_written(
    tmp_path: Path, written: list[list[int]], data: st.DataObject
) -> None:
    writer = DocumentWriter(tmp_path, seed=0)
    for ids in written:
        writer.add(ids, [-100, *ids[1:]][: len(ids)])
    documents, digests = writer.finish()
    assert [document.input_ids.tolist() for document in documents] == written
    assert [document.labels.tolist() for document in documents] == [[-100, *ids[1:]][: len(ids)] for ids in written]
    assert len(set(digests.tolist())) == len({tuple(ids) for ids in written})
    mask = np.array([data.draw(st.booleans()) for _ in written], bool)
    chosen = documents.chosen(mask)
    assert [document.input_ids.tolist() for document in chosen] == [
        ids for ids, wanted in zip(written, mask, strict=True) if wanted
    ]
    assert Corpus(chosen, []).tokens == sum(len(document) for document in chosen)


def test_documents_differ_by_what_is_learnt_of_them(tmp_path: Path) -> None:
    writer = DocumentWriter(tmp_path, seed=0)
    writer.add([1, 2], [-100, 2])
    writer.add([1, 2], [-100, -100])
    digests = writer.finish()[1]
    assert digests[0] != digests[1]


def test_the_seed_shuffles_the_digests(tmp_path: Path) -> None:
    orders = []
    for seed in (1, 2):
        writer = DocumentWriter(tmp_path, seed)
        for token in range(50):
            writer.add([token], [token])
        orders.append(np.argsort(writer.finish()[1]).tolist())
    assert orders[0] != orders[1]


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    writer = DocumentWriter(tmp_path, seed=0)
    writer.add([1], [1])
    writer.finish()
    assert list(tmp_path.iterdir()) == []
