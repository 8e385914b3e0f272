"""Filter, split, cut and count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data import TrainingData, load_data, split_rows
from qlora_trainer.formats import IGNORED
from qlora_trainer.rows import Row
from qlorajob.errors import Reason, StepError
from tests.unit.trainer.jobs import Job

ROWS = [Row({"n": number}, f"line {number}") for number in range(100)]
WriteRows = Callable[..., Path]


def _load(job: Job, tokenizer: Any, **dataset: Any) -> TrainingData:
    return load_data(job.change(dataset=dataset).settings(), tokenizer)


def test_the_split_holds_out_the_fraction() -> None:
    train, held_out = split_rows(ROWS, 0.2, seed=1)
    assert (len(train), len(held_out)) == (80, 20)


def test_the_same_seed_holds_out_the_same_rows() -> None:
    assert split_rows(ROWS, 0.2, seed=1) == split_rows(ROWS, 0.2, seed=1)


def test_another_seed_holds_out_other_rows() -> None:
    assert split_rows(ROWS, 0.2, seed=1) != split_rows(ROWS, 0.2, seed=2)


def test_a_small_fraction_still_holds_out_a_row() -> None:
    assert len(split_rows(ROWS[:3], 0.01, seed=1)[1]) == 1


def test_a_large_fraction_still_leaves_a_row_to_train_on() -> None:
    assert len(split_rows(ROWS[:3], 0.99, seed=1)[0]) == 1


def test_the_filter_keeps_the_rows_with_the_value(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "yes"})
    data = _load(job, tokenizer, uri=f"file://{path}", filter={"label": "yes"}, validation=None)
    assert (len(data.train.documents), data.dropped_rows) == (2, 1)


@pytest.mark.parametrize(("value", "wanted"), [(True, "true"), (3, "3"), (None, "")])
def test_the_filter_compares_as_text(job: Job, tokenizer: Any, write_rows: WriteRows, value: Any, wanted: str) -> None:
    path = write_rows({"text": "a", "label": value}, {"text": "b", "label": "other"})
    data = _load(job, tokenizer, uri=f"file://{path}", filter={"label": wanted}, validation=None)
    assert len(data.train.documents) == 1


def test_a_filter_on_a_missing_column_is_refused(job: Job, tokenizer: Any) -> None:
    with pytest.raises(StepError, match="no column gold; the dataset has instruction, input, output") as refused:
        _load(job, tokenizer, filter={"gold": "x"})
    assert (refused.value.reason, refused.value.field) == (Reason.COLUMN_MISSING, "dataset.filter")


def test_a_filter_that_keeps_nothing_is_refused(job: Job, tokenizer: Any) -> None:
    with pytest.raises(StepError, match="no row is left to train on") as refused:
        _load(job, tokenizer, filter={"input": "nowhere"}, validation=None)
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_EMPTY, "dataset.filter")


def test_a_dataset_without_rows_is_refused(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    with pytest.raises(StepError, match="has no rows") as refused:
        _load(job, tokenizer, uri=f"file://{write_rows()}")
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_EMPTY, "dataset.uri")


def test_validation_may_be_a_dataset_of_its_own(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"instruction": "x", "output": "y"}, name="held-out.jsonl")
    data = _load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None})
    assert data.validation is not None
    assert (len(data.train.documents), len(data.validation.documents)) == (48, 1)


def test_validation_data_change_the_digest(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    digests = set()
    for output in ("y", "z"):
        path = write_rows({"instruction": "x", "output": output}, name="held-out.jsonl")
        digests.add(_load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None}).digest)
    assert len(digests) == 2


def test_long_rows_are_cut_at_the_end(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"text": "zulu " * 100}, {"text": "zulu"})
    data = _load(job, tokenizer, uri=f"file://{path}", validation=None)
    assert [len(document) for document in data.train.documents] == [64, 3]
    assert data.truncated_rows == 1


def test_a_row_whose_completion_is_cut_off_is_dropped(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"prompt": "zulu " * 100, "completion": "x"}, {"prompt": "zulu", "completion": " x"})
    data = _load(job, tokenizer, uri=f"file://{path}", validation=None)
    assert (len(data.train.documents), data.dropped_rows) == (1, 1)


def test_the_first_token_of_a_document_is_never_learnt(job: Job, tokenizer: Any) -> None:
    data = _load(job, tokenizer)
    assert {int(document.labels[0]) for document in data.train.documents} == {IGNORED}


def test_without_packing_each_row_is_a_sequence(job: Job, tokenizer: Any) -> None:
    data = load_data(job.change(training={"packing": False}).settings(), tokenizer)
    assert len(data.train.sequences) == len(data.train.documents)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        pytest.param({"maxSteps": 7}, 7, id="maxSteps"),
        pytest.param({"maxSteps": None, "epochs": 2, "packing": False, "globalBatchSize": 16}, 6, id="2 × ⌈43/16⌉"),
        pytest.param({"maxSteps": None, "epochs": 0.5, "packing": False, "globalBatchSize": 16}, 2, id="⌈0.5 × 3⌉"),
        pytest.param({"maxSteps": None, "packing": False, "globalBatchSize": 43}, 3, id="3 epochs by default"),
    ],
)
def test_steps_follow_from_rows_and_global_batch(
    job: Job, tokenizer: Any, training: dict[str, Any], steps: int
) -> None:
    settings = job.change(training=training).settings()
    assert load_data(settings, tokenizer).total_steps(settings.spec) == steps
