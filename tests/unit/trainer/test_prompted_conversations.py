"""Prompt and completion that are lists of messages: TRL's conversational prompt-completion format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from qlora_trainer.chat import FIELD
from qlora_trainer.data import load_data
from qlora_trainer.formats import IGNORED, Columns, Encoder
from qlora_trainer.rows import Row, read_file
from qlorajob.errors import Reason, StepError
from qlorajob.spec import DatasetSpec
from tests.unit.trainer.jobs import Job
from tests.unit.trainer.test_chat import (
    CONVERSATION,
    FORGETFUL,
    LINES,
    MARKED,
    TOOLS,
    WITH_TOOLS,
    of_trl,
    with_template,
)

SPEC = DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl"})
FORMAT = "conversational prompt-completion"
ASKED, ANSWER = CONVERSATION[:2], CONVERSATION[2:3]
ROW = {"prompt": ASKED, "completion": ANSWER}
FIELDS = {"prompt": "dataset.columns.prompt", "completion": "dataset.columns.completion"}


def encoder_of(tokenizer: Any, *records: dict[str, Any], spec: DatasetSpec = SPEC) -> Encoder:
    rows = [Row(record, f"line {number}") for number, record in enumerate(records, start=1)]
    return Encoder(tokenizer, spec, Columns.detect(spec, list(records[0]), rows))


def encode(tokenizer: Any, record: dict[str, Any], **spec: Any) -> tuple[list[int], list[int]]:
    (document,) = encoder_of(tokenizer, record, spec=SPEC.model_copy(update=spec)).encode([Row(record, "line 1")])
    assert document is not None
    return document


def learnt(tokenizer: Any, record: dict[str, Any]) -> str:
    ids, labels = encode(tokenizer, record)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    text: str = tokenizer.decode([label for label in labels if label != IGNORED])
    return text


def refusal(tokenizer: Any, *records: dict[str, Any]) -> StepError:
    encoder = encoder_of(tokenizer, *records)
    with pytest.raises(StepError) as refused:
        list(encoder.encode([Row(record, f"rows.jsonl line {n}") for n, record in enumerate(records, start=1)]))
    return refused.value


@pytest.mark.parametrize("format_", ["auto", "prompt-completion"])
def test_prompt_and_completion_are_one_conversation(tokenizer: Any, format_: str) -> None:
    ids, _ = encode(tokenizer, ROW, format=format_)
    assert tokenizer.decode(ids) == "<|system|>Be brief.</s><|user|>code of zulu?</s><|assistant|>zul</s>"


TEMPLATES = pytest.mark.parametrize(
    ("template", "answers"),
    [
        pytest.param(None, ["zul</s>", "ewe</s>"], id="its own"),
        pytest.param(LINES, ["zul</s>", "ewe</s>"], id="lines"),
        pytest.param(MARKED, ["zul</s>", "ewe</s>"], id="marked"),
        pytest.param(of_trl("llama3"), ["zul<|eot_id|>", "ewe<|eot_id|>"], id="llama3"),
        pytest.param(
            of_trl("qwen3"),
            [f"<think>\n\n</think>\n\n{said}<|im_end|>\n" for said in ("zul", "ewe")],
            id="qwen3, which rewrites its history",
        ),
    ],
)


@TEMPLATES
@pytest.mark.parametrize("given", [2, 4])
def test_only_what_the_assistant_says_in_the_completion_is_learnt(
    tokenizer: Any, template: str | None, answers: list[str], given: int
) -> None:
    """Of an earlier answer, which belongs to the prompt, nothing; of a later question neither."""
    templated = with_template(tokenizer, template or tokenizer.chat_template)
    record = {"prompt": CONVERSATION[:given], "completion": CONVERSATION[given:]}
    assert learnt(templated, record) == "".join(answers[given // 2 - 1 :])
    assert encode(templated, record)[0] == encode_chat(templated, CONVERSATION)[0]


def encode_chat(tokenizer: Any, messages: list[Any]) -> tuple[list[int], list[int]]:
    (document,) = Encoder(tokenizer, SPEC, Columns.detect(SPEC, ["messages"])).encode(
        [Row({"messages": messages}, "line 1")]
    )
    assert document is not None
    return document


def test_a_template_that_rewrites_the_prompt_once_it_is_answered_is_refused(tokenizer: Any) -> None:
    refused = refusal(with_template(tokenizer, FORGETFUL), ROW)
    assert (refused.reason, refused.field) == (Reason.TEMPLATE_INVALID, "dataset.format")
    assert "give prompt and completion as text" in refused.message


def test_a_tool_s_answer_within_a_completion_is_not_learnt(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "code"}}]}
    turns = [call, {"role": "tool", "content": "z"}, *ANSWER]
    assert learnt(tokenizer, {"prompt": ASKED, "completion": turns}) == "</s>zul</s>"


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
@pytest.mark.parametrize("template", [None, MARKED], ids=["its own", "marked"])
def test_the_template_is_told_the_tools(tokenizer: Any, tools: Any, template: str | None) -> None:
    knows = with_template(tokenizer, WITH_TOOLS + (template or tokenizer.chat_template))
    record = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:], "tools": tools}
    assert knows.decode(encode(knows, record)[0]).startswith('{"name": "code", "parameters": {"type": "object"}}</s>')
    assert learnt(knows, record) == "ewe</s>"


@pytest.mark.parametrize("prompt", [None, [], ""])
def test_a_row_may_have_no_prompt(tokenizer: Any, prompt: Any) -> None:
    assert learnt(tokenizer, {"prompt": prompt, "completion": CONVERSATION}) == "zul</s>ewe</s>"


@pytest.mark.parametrize(
    "completion", [None, [], "", "[]", CONVERSATION[:1], [{"role": "assistant", "content": " "}]], ids=str
)
def test_a_completion_in_which_the_assistant_says_nothing_is_dropped(tokenizer: Any, completion: Any) -> None:
    """As an empty text is, and a conversation in which nobody answers."""
    record = {"prompt": CONVERSATION[:4], "completion": completion}
    assert list(encoder_of(tokenizer, record).encode([Row(record, "line 1")])) == [None]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "JSON text"])
def test_files_hold_them_as_lists_or_as_json_text(tokenizer: Any, tmp_path: Path, suffix: str, as_text: bool) -> None:
    path, row = tmp_path / f"rows.{suffix}", ROW
    if as_text or suffix == "csv":
        row = {part: json.dumps(messages) for part, messages in ROW.items()}
    table = pandas.DataFrame([row, row])
    match suffix:
        case "csv":
            table.to_csv(path, index=False)
        case "parquet":
            table.to_parquet(path)
        case _:
            table.to_json(path, orient="records", lines=suffix == "jsonl")
    rows = list(read_file(path, path.name))
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, list(rows[0].values), rows))
    assert list(encoder.encode(rows)) == [encode(tokenizer, ROW)] * 2


@pytest.mark.parametrize("completion", ["[1, 2]", '[{"name": "zulu"}]', '[{"role": "assistant", "content": "x"}]'])
@pytest.mark.parametrize("prompt", ["code?", '[{"word": "zulu"}]', "[]", "{", '{"role": "user", "content": "x"}'])
def test_text_that_happens_to_be_json_is_text(tokenizer: Any, prompt: str, completion: str) -> None:
    ids, labels = encode(tokenizer, {"prompt": prompt, "completion": completion})
    assert tokenizer.decode(ids) == f"{prompt}{completion}</s>"
    assert IGNORED in labels


def test_rows_without_a_prompt_do_not_say_which_it_is(tokenizer: Any) -> None:
    as_text = {part: json.dumps(messages) for part, messages in ROW.items()}
    encoder = encoder_of(tokenizer, {"prompt": "", "completion": "x"}, as_text)
    assert encoder.columns.format == FORMAT


@pytest.mark.parametrize(
    ("record", "part", "words"),
    [
        pytest.param(
            {"prompt": CONVERSATION[:3], "completion": CONVERSATION[4:]}, "prompt",
            "column prompt ends with what the assistant says: move that to column completion", id="answer",
        ),
        pytest.param({"completion": "zul"}, "completion",
            "column completion is not valid JSON: .*; give a list of messages, or that as JSON", id="text"),
        pytest.param({"prompt": "zulu?"}, "prompt", "column prompt is not valid JSON", id="prompt of text"),
        pytest.param({"completion": {"role": "assistant"}}, "completion", "must be a list of messages", id="dict"),
        pytest.param({"completion": [{"role": "x"}]}, "completion", "role of message 1 in .* is x;", id="role"),
        pytest.param({"prompt": ["zulu?"]}, "prompt", "column prompt must be a list of messages", id="words"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [{}, ROW], ids=["first row", "later row"])
def test_what_cannot_be_read_is_named(
    tokenizer: Any, record: dict[str, Any], part: str, words: str, first: dict[str, Any]
) -> None:
    refused = refusal(tokenizer, *filter(None, [first, ROW | record]))
    assert re.search(rf"^dataset: rows.jsonl line {2 if first else 1}: .*{words}", refused.message)
    assert (refused.reason, refused.field) == (Reason.DATASET_INVALID, FIELDS[part])


def test_messages_among_rows_of_text_are_named(tokenizer: Any) -> None:
    refused = refusal(tokenizer, {"prompt": "x", "completion": "y"}, ROW)
    assert refused.message.startswith("dataset: rows.jsonl line 2: column prompt holds list, not text")
    assert refused.field == FIELDS["prompt"]


def test_a_row_that_the_template_refuses_is_named_with_its_columns(tokenizer: Any) -> None:
    refused = refusal(with_template(tokenizer, "{{ raise_exception('no') }}"), ROW)
    assert refused.message == "dataset: rows.jsonl line 1: the chat template refuses it: no"
    assert refused.field == FIELDS["prompt"] != FIELD


def test_half_a_character_is_named_with_its_columns(tokenizer: Any) -> None:
    refused = refusal(tokenizer, {"prompt": ASKED, "completion": [{"role": "assistant", "content": "\ud83d"}]})
    assert r"line 1: column prompt or completion holds \ud83d, half of a character" in refused.message


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(StepError, match=r"dataset\.format: the model's tokenizer has no chat template"):
        encode(with_template(tokenizer, ""), ROW)


def test_prompts_are_put_as_questions_and_the_report_tells_merge_to_do_so(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer, ROW)
    again = Encoder(tokenizer, SPEC, Columns(encoder.columns.format, {}))
    assert encoder.prompt_text("zulu?") == again.prompt_text("zulu?") == "<|user|>zulu?</s><|assistant|>"
    assert encoder.prompt_ids("zulu?") == again.prompt_ids("zulu?")


def test_the_kind_is_that_of_the_rows_that_the_filter_leaves(job: Job, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "kind": "text"}, ROW | {"kind": "chat"}, ROW | {"kind": "chat"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = {"uri": f"file://{tmp_path}/rows.jsonl", "filter": {"kind": "chat"}, "format": None, "template": None}
    data = load_data(job.change(dataset=dataset | {"columns": None, "validation": None}).settings(), tokenizer)
    assert data.format == FORMAT
    assert data.summary.dropped == {"filter": 1}
