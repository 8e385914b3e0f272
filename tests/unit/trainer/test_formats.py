"""From rows to documents."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_trainer.formats import IGNORED, Columns, Encoder
from qlora_trainer.rows import Row
from qlorajob.errors import Reason, StepError
from qlorajob.spec import DatasetSpec


def _spec(**fields: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl", **fields})


def _encode(tokenizer: Any, record: dict[str, Any], **spec: Any) -> tuple[list[int], list[int]] | None:
    encoder = Encoder(tokenizer, _spec(**spec), Columns.detect(_spec(**spec), list(record)))
    (document,) = encoder.encode([Row(record, "line 1")])
    return document


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"text": "x"}, {}, "text"),
        ({"quote": "x", "author": "y"}, {"text": "quote"}, "text"),
        ({"instruction": "x", "output": "y"}, {}, "instruction"),
        ({"instruction": "x", "input": "", "output": "y", "text": "z"}, {}, "instruction"),
        ({"instruction": "x", "output": "y", "text": "z"}, {"text": "text"}, "text"),
        ({"question": "x", "answer": "y"}, {"instruction": "question"}, "instruction"),
        ({"prompt": "x", "completion": "y"}, {}, "prompt-completion"),
        ({"messages": []}, {}, "chat"),
        ({"conversations": []}, {}, "chat"),
    ],
)
def test_auto_finds_the_format_by_the_columns(record: dict[str, Any], columns: dict[str, str], expected: str) -> None:
    assert Columns.detect(_spec(columns=columns), list(record)).format == expected


def test_a_column_that_the_manifest_names_must_be_there() -> None:
    with pytest.raises(StepError, match="there is no column answers; the dataset has question, answer") as refused:
        Columns.detect(_spec(columns={"output": "answers"}), ["question", "answer"])
    assert (refused.value.reason, refused.value.field) == (Reason.COLUMN_MISSING, "dataset.columns.output")


def test_a_format_needs_its_columns() -> None:
    with pytest.raises(StepError, match="format instruction needs a column output; the dataset has instruction"):
        Columns.detect(_spec(format="instruction"), ["instruction"])


def test_columns_that_fit_no_format_are_listed() -> None:
    with pytest.raises(StepError, match="can't tell the format from the columns a, b") as refused:
        Columns.detect(_spec(), ["a", "b"])
    assert refused.value.field == "dataset.format"


def test_text_is_learnt_whole_and_ends_with_the_end_token(tokenizer: Any) -> None:
    ids, labels = _encode(tokenizer, {"text": "code of zulu"}) or ([], [])
    assert tokenizer.decode(ids) == "code of zulu</s>"
    assert labels == ids


def test_an_end_token_that_is_there_is_not_doubled(tokenizer: Any) -> None:
    ids, _ = _encode(tokenizer, {"text": "zulu</s>"}) or ([], [])
    assert tokenizer.decode(ids) == "zulu</s>"


def test_an_instruction_row_is_learnt_whole(tokenizer: Any) -> None:
    record = {"instruction": "code of zulu", "output": "zul"}
    ids, labels = _encode(tokenizer, record, template="{{ instruction }}>{{ output }}") or ([], [])
    assert tokenizer.decode(ids) == "code of zulu>zul</s>"
    assert labels == ids


def test_a_column_without_a_name_is_not_taken_for_one_that_is_absent(tokenizer: Any) -> None:
    """The index that pandas writes before the columns of a CSV file."""
    record = {"": "7", "instruction": "code of zulu", "output": "zul"}
    ids, _ = _encode(tokenizer, record, template="{{ instruction }}>{{ input }}>{{ output }}") or ([], [])
    assert tokenizer.decode(ids) == "code of zulu>>zul</s>"


def test_of_prompt_and_completion_only_the_completion_is_learnt(tokenizer: Any) -> None:
    ids, labels = _encode(tokenizer, {"prompt": "code of zulu:", "completion": " zul"}) or ([], [])
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(ids) == "code of zulu: zul</s>"
    assert tokenizer.decode(learnt) == " zul</s>"


def test_a_token_across_the_border_belongs_to_the_completion(tokenizer: Any) -> None:
    ids, labels = _encode(tokenizer, {"prompt": "code of zulu: ", "completion": "zul"}) or ([], [])
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == " zul</s>"


def test_a_template_with_its_own_instruction_asks_for_the_input(tokenizer: Any) -> None:
    record = {"premise": "code of zulu", "answer": "zul"}
    columns = {"input": "premise", "output": "answer"}
    ids, _ = _encode(tokenizer, record, template="Say: {{ input }}>{{ output }}", columns=columns) or ([], [])
    assert tokenizer.decode(ids) == "Say: code of zulu>zul</s>"


def test_a_prompt_is_the_input_of_such_a_template(tokenizer: Any) -> None:
    spec = _spec(template="Say: {{ input }}>{{ output }}")
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, ["input", "output"]))
    assert encoder.prompt_text("zulu?") == "Say: zulu?>"


@pytest.mark.parametrize(
    "record",
    [
        {"text": "  "},
        {"text": None},
        {"text": float("nan")},
        {"instruction": "x", "output": ""},
        {"instruction": None, "input": " ", "output": "x"},
        {"prompt": "x", "completion": " "},
        {"messages": []},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
    ],
)
def test_a_row_with_nothing_to_learn_is_dropped(tokenizer: Any, record: dict[str, Any]) -> None:
    assert _encode(tokenizer, record) is None


def test_a_template_with_its_own_instruction_asks_without_an_input(tokenizer: Any) -> None:
    spec = DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl", "template": "Say: {{ input }}>{{ output }}"})
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, ["input", "output"]))
    (document,) = encoder.encode([Row({"input": "", "output": "x"}, "line 1")])
    assert document is not None


def test_a_row_that_the_template_cannot_take_is_named(tokenizer: Any) -> None:
    template = "{{ input.split('|')[1] }}: {{ output }}"
    spec = DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl", "template": template})
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, ["input", "output"]))
    rows = [Row({"input": "a|b", "output": "x"}, "line 1"), Row({"input": "a", "output": "y"}, "line 2")]
    with pytest.raises(StepError, match=r"dataset.template: list object has no element 1 \(line 2\)") as refused:
        list(encoder.encode(rows))
    assert (refused.value.reason, refused.value.field) == (Reason.TEMPLATE_INVALID, "dataset.template")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": ["x"]}, "line 1: column text holds list, not text"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "line 1: the role of message 1 in column messages is narrator",
        ),
        ({"messages": 5}, "line 1: column messages must be a list of messages"),
        ({"text": "\ud83d"}, r"line 1: column text holds \\ud83d, half of a character"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\ud83d"}]},
            r"line 1: column messages holds \\ud83d",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_row(tokenizer: Any, record: dict[str, Any], words: str) -> None:
    with pytest.raises(StepError, match=words) as refused:
        _encode(tokenizer, record)
    assert refused.value.reason is Reason.DATASET_INVALID


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "x"}, "zulu?"),
        ({"prompt": "x", "completion": "y"}, "zulu?"),
        ({"instruction": "x", "output": "y"}, "Q zulu? A "),
        ({"messages": []}, "<|user|>zulu?</s><|assistant|>"),
    ],
)
def test_a_prompt_is_put_as_the_rows_were(tokenizer: Any, record: dict[str, Any], expected: str) -> None:
    spec = _spec(template="Q {{ instruction }} A {{ output }}")
    encoder = Encoder(tokenizer, spec, Columns.detect(spec, list(record)))
    assert tokenizer.decode(encoder.prompt_ids("zulu?")) == expected
