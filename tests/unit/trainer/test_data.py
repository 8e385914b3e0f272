"""Filter, split, cut and count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from qlora_trainer.corpus import Corpus
from qlora_trainer.data import TrainingData, load_data
from qlora_trainer.formats import IGNORED
from qlora_trainer.statistics import histogram
from qlorajob.errors import Reason, StepError
from tests.unit.trainer.jobs import Job

WriteRows = Callable[..., Path]


def _load(job: Job, tokenizer: Any, **dataset: Any) -> TrainingData:
    return load_data(job.change(dataset=dataset).settings(), tokenizer)


def test_the_filter_keeps_the_rows_with_the_value(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": "yes"})
    data = _load(job, tokenizer, uri=f"file://{path}", filter={"label": "yes"}, validation=None)
    assert (len(data.train.documents), data.dropped_rows) == (2, 1)


@pytest.mark.parametrize(
    ("value", "wanted"), [(True, "true"), (3, "3"), (3.0, "3"), (3.0, "3.0"), (float("nan"), ""), (None, "")]
)
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


@pytest.mark.parametrize(
    ("record", "changes", "field", "words"),
    [
        ({"prompt": "zulu " * 100, "completion": "x"}, {}, "training.maxSequenceLength", "cut 2"),
        ({"prompt": "zulu", "completion": ""}, {}, "dataset.columns", "empty 2"),
        ({"prompt": "zulu", "completion": "x"}, {"filter": {"prompt": "ewe"}}, "dataset.filter", "filter 2"),
        ({"prompt": "zulu", "completion": "x"}, {"deduplicate": True}, "dataset.deduplicate", "duplicate 2"),
    ],
)
def test_where_no_row_is_left_the_field_that_dropped_them_is_named(
    job: Job, tokenizer: Any, write_rows: WriteRows, record: Any, changes: Any, field: str, words: str
) -> None:
    path = write_rows(record, record)
    validation = {"uri": f"file://{path}", "fraction": None} if "deduplicate" in changes else None
    with pytest.raises(StepError, match=rf"no row is left to train on \(dropped: {words}\)") as refused:
        _load(job, tokenizer, uri=f"file://{path}", validation=validation, **changes)
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_EMPTY, field)


def test_where_no_validation_row_is_left_it_says_why(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"instruction": "x", "output": ""}, name="held-out.jsonl")
    with pytest.raises(StepError, match=r"no row is left to validate on \(dropped: empty 1\)"):
        _load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None})


def test_validation_data_need_the_input_of_a_template_without_an_instruction(
    job: Job, tokenizer: Any, write_rows: WriteRows
) -> None:
    path = write_rows({"output": "y"}, name="held-out.jsonl")
    with pytest.raises(StepError, match="the validation data need a column input"):
        _load(
            job,
            tokenizer,
            template="{{ input }}>{{ output }}",
            validation={"uri": f"file://{path}", "fraction": None},
        )


def test_a_dataset_without_rows_is_refused(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    with pytest.raises(StepError, match="has no rows") as refused:
        _load(job, tokenizer, uri=f"file://{write_rows()}")
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_EMPTY, "dataset.uri")


def test_validation_may_be_a_dataset_of_its_own(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"instruction": "x", "output": "y"}, name="held-out.jsonl")
    data = _load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None})
    assert data.validation is not None
    assert (len(data.train.documents), len(data.validation.documents)) == (48, 1)


def test_a_file_has_no_other_split_to_validate_on(job: Job, tokenizer: Any) -> None:
    """Else the gate would ask for what has just been learnt."""
    with pytest.raises(StepError, match="are the training rows themselves") as refused:
        _load(job, tokenizer, validation={"split": "test", "fraction": None})
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_INVALID, "dataset.validation.split")


def test_validation_data_change_the_digest(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    digests = set()
    for output in ("y", "z"):
        path = write_rows({"instruction": "x", "output": output}, name="held-out.jsonl")
        digests.add(_load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None}).digest)
    assert len(digests) == 2


def _texts(tokenizer: Any, corpus: Corpus | None) -> list[str]:
    assert corpus is not None
    return [tokenizer.decode(document.input_ids) for document in corpus.documents]


def test_the_fraction_is_held_out(job: Job, tokenizer: Any) -> None:
    data = _load(job, tokenizer, validation={"fraction": 0.25})
    train, held_out = _texts(tokenizer, data.train), _texts(tokenizer, data.validation)
    assert (len(train), len(held_out)) == (36, 12)
    assert not set(train) & set(held_out)


def test_the_same_seed_holds_out_the_same_rows_and_another_one_others(job: Job, tokenizer: Any) -> None:
    held_out = []
    for seed in (1, 1, 2):
        job.change(training={"seed": seed})
        held_out.append(_texts(tokenizer, load_data(job.settings(), tokenizer).validation))
    assert held_out[0] == held_out[1] != held_out[2]


def test_equal_rows_are_held_out_together(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(*[{"text": f"row {number % 10}"} for number in range(100)])
    data = _load(job, tokenizer, uri=f"file://{path}", validation={"fraction": 0.2})
    train, held_out = _texts(tokenizer, data.train), _texts(tokenizer, data.validation)
    assert (len(train), len(held_out)) == (80, 20)
    assert not set(train) & set(held_out)


def test_rows_that_are_all_equal_cannot_be_held_out(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"text": "a"}, {"text": "a"})
    with pytest.raises(StepError, match="no row is left to validate on") as refused:
        _load(job, tokenizer, uri=f"file://{path}", validation={"fraction": 0.5})
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_EMPTY, "dataset.validation")


def test_of_equal_rows_one_is_used(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"text": "a", "id": 1}, {"text": "b", "id": 2}, {"text": "a", "id": 3})
    data = _load(job, tokenizer, uri=f"file://{path}", deduplicate=True, validation=None)
    assert _texts(tokenizer, data.train) == ["a</s>", "b</s>"]
    assert data.summary.dropped == {"duplicate": 1}


def test_equal_rows_are_kept_unless_the_manifest_says_otherwise(
    job: Job, tokenizer: Any, write_rows: WriteRows
) -> None:
    path = write_rows({"text": "a"}, {"text": "a"})
    data = _load(job, tokenizer, uri=f"file://{path}", validation=None)
    assert _texts(tokenizer, data.train) == ["a</s>", "a</s>"]


@pytest.mark.parametrize(
    ("deduplicate", "train", "shared", "dropped"),
    [(False, ["a</s>", "b</s>"], 1, {}), (True, ["a</s>"], 0, {"duplicate": 2})],
)
def test_training_rows_that_are_validation_rows_too(
    job: Job,
    tokenizer: Any,
    write_rows: WriteRows,
    deduplicate: bool,
    train: list[str],
    shared: int,
    dropped: dict[str, int],
) -> None:
    path = write_rows({"text": "a"}, {"text": "b"})
    own = write_rows({"text": "b"}, {"text": "c"}, {"text": "c"}, name="validation.jsonl")
    dataset = {"uri": f"file://{path}", "validation": {"uri": f"file://{own}", "fraction": None}}
    data = _load(job, tokenizer, deduplicate=deduplicate, **dataset)
    assert _texts(tokenizer, data.train) == train
    assert (data.summary.shared_rows, data.summary.dropped) == (shared, dropped)


def test_validation_data_need_the_columns_of_the_training_data(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows({"instruction": "x", "answer": "y"}, name="held-out.jsonl")
    with pytest.raises(StepError, match="need a column output, as the training data; they have instruction") as refused:
        _load(job, tokenizer, validation={"uri": f"file://{path}", "fraction": None})
    assert (refused.value.reason, refused.value.field) == (Reason.COLUMN_MISSING, "dataset.validation.uri")


def test_what_became_of_the_rows_is_counted(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(
        {"prompt": "zulu", "completion": " x", "lang": "en"},
        {"prompt": "zulu", "completion": " x", "lang": "en"},
        {"prompt": "zulu", "completion": " x", "lang": "de"},
        {"prompt": "zulu", "completion": " ", "lang": "en"},
        {"prompt": "zulu " * 100, "completion": "x", "lang": "en"},
        {"prompt": "zulu", "completion": " x" * 100, "lang": "en"},
    )
    data = _load(job, tokenizer, uri=f"file://{path}", filter={"lang": "en"}, deduplicate=True, validation=None)
    assert data.summary.dropped == {"cut": 1, "duplicate": 1, "empty": 1, "filter": 1}
    assert (data.summary.read_rows, len(data.train.documents), data.dropped_rows) == (6, 2, 4)
    assert data.summary.truncated_rows == 1
    assert data.summary.learnt_tokens == sum(int((d.labels != IGNORED).sum()) for d in data.train.documents)


def test_lengths_are_counted_before_rows_are_cut(job: Job, tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(*[{"text": "zulu " * count} for count in (1, 8, 100)])
    data = _load(job, tokenizer, uri=f"file://{path}", validation=None)
    lengths = [len(tokenizer("zulu " * count)["input_ids"]) + 1 for count in (1, 8, 100)]
    assert data.summary.longest_row == lengths[-1]
    assert data.summary.lengths == histogram(np.array(lengths))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], {}),
        ([1, 16], {"16": 2}),
        ([17], {"16": 0, "32": 1}),
        ([16, 17, 32, 33, 128], {"16": 1, "32": 2, "64": 1, "128": 1}),
    ],
)
def test_a_histogram_has_powers_of_two(lengths: list[int], expected: dict[str, int]) -> None:
    assert histogram(np.array(lengths, np.int64)) == expected


records = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["zulu", "ewe " * 40]), "completion": st.sampled_from([" x", " ", " y" * 80])},
    optional={"lang": st.sampled_from(["en", "de"])},
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(records, min_size=1, max_size=30),
    deduplicate=st.booleans(),
    fraction=st.none() | st.floats(0.05, 0.9),
    wanted=st.sampled_from([{}, {"lang": "en"}]),
)
def test_every_row_is_trained_on_or_held_out_or_dropped_for_a_reason(
    job: Job,
    tokenizer: Any,
    write_rows: WriteRows,
    rows: list[dict[str, str]],
    deduplicate: bool,
    fraction: float | None,
    wanted: dict[str, str],
) -> None:
    path = write_rows({"prompt": "", "completion": "", "lang": ""}, *rows)
    validation = None if fraction is None else {"fraction": fraction}
    dataset = {"uri": f"file://{path}", "deduplicate": deduplicate, "validation": validation}
    job.spec["dataset"]["filter"] = wanted
    try:
        data = _load(job, tokenizer, **dataset)
    except StepError as error:
        event(f"refused: {error.reason}")
        assume(error.reason is not Reason.DATASET_EMPTY)
        raise
    held_out = len(data.validation.documents) if data.validation else 0
    assert len(data.train.documents) + held_out + data.dropped_rows == data.summary.read_rows == len(rows) + 1
    assert sum(data.summary.lengths.values()) == len(data.train.documents)


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
