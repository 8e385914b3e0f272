"""Conversations: what of them is learnt."""

from __future__ import annotations

import copy
import importlib.resources
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.formats import IGNORED, Columns, Encoder
from qlora_trainer.rows import Row, read_file
from qlorajob.errors import Reason, StepError
from qlorajob.spec import DatasetSpec

SPEC = DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl"})
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""Like ChatML: a line break follows each turn."""
FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content if loop.last else message.content | upper }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "code of zulu?"},
    {"role": "assistant", "content": "zul"},
    {"role": "user", "content": "and of ewe?"},
    {"role": "assistant", "content": "ewe"},
]


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def of_trl(name: str) -> str:
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def encode(tokenizer: Any, messages: Any, column: str = "messages") -> tuple[list[int], list[int]]:
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, [column]))
    (document,) = encoder.encode([Row({column: messages}, "line 1")])
    assert document is not None
    return document


def learnt(tokenizer: Any, messages: Any) -> str:
    ids, labels = encode(tokenizer, messages)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    text: str = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])
    return text


def test_a_conversation_is_what_the_chat_template_makes_of_it(tokenizer: Any) -> None:
    ids, _ = encode(tokenizer, CONVERSATION[1:3])
    assert tokenizer.decode(ids) == "<|user|>code of zulu?</s><|assistant|>zul</s>"


def test_every_answer_is_learnt_up_to_its_end_and_nothing_else(tokenizer: Any) -> None:
    assert learnt(tokenizer, CONVERSATION) == "zul</s>ewe</s>"


def test_marks_of_the_template_say_what_is_learnt(tokenizer: Any) -> None:
    assert learnt(with_template(tokenizer, MARKED), CONVERSATION) == "zul</s>ewe</s>"


def test_the_line_break_between_turns_is_not_learnt(tokenizer: Any) -> None:
    assert learnt(with_template(tokenizer, LINES), CONVERSATION) == "zul</s>ewe</s>"


def test_a_heading_that_only_a_question_gets_is_not_learnt(tokenizer: Any) -> None:
    """DeepSeek-R1 and others open the answer with <think> when they are asked, and drop it from the history."""
    thinking = with_template(tokenizer, LINES.replace("assistant:\n{% endif", "assistant:\n<think>{% endif"))
    assert learnt(thinking, CONVERSATION) == "zul</s>ewe</s>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", "zul<|im_end|>ewe<|im_end|>"),
        ("llama3", "zul<|eot_id|>ewe<|eot_id|>"),
        ("phi3", "zul<|end|>\newe<|end|>\n</s>"),
        ("gemma3", "zul<end_of_turn>ewe<end_of_turn>"),
        # Rewrites its history, so that TRL's version of it is used.
        ("qwen3", "<think>\n\n</think>\n\nzul<|im_end|>\n<think>\n\n</think>\n\newe<|im_end|>\n"),
    ],
)
def test_the_templates_of_the_usual_families_are_understood(tokenizer: Any, name: str, expected: str) -> None:
    assert learnt(with_template(tokenizer, of_trl(name)), CONVERSATION) == expected


@pytest.mark.parametrize("line_break", ["", "\n"])
def test_a_template_that_leaves_the_last_turn_open_gets_an_end_to_learn(tokenizer: Any, line_break: str) -> None:
    """GLM's: the next question's heading ends an answer, and after the last one comes none."""
    glm = with_template(
        tokenizer,
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}" + line_break + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    )
    assert learnt(glm, CONVERSATION) == "zulewe</s>"
    assert learnt(glm, [*CONVERSATION, {"role": "user", "content": "thanks"}]) == "zulewe"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    with pytest.raises(StepError, match=r"writes a turn differently when another one follows.*line 1") as refused:
        learnt(with_template(tokenizer, FORGETFUL), CONVERSATION)
    assert (refused.value.reason, refused.value.field) == (Reason.TEMPLATE_INVALID, "dataset.format")


def test_a_row_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(StepError, match="line 1: the chat template refuses it: roles must alternate") as refused:
        learnt(strict, CONVERSATION)
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_INVALID, "dataset.columns.messages")


def test_share_gpt_turns_are_understood(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "code?"}, {"from": "gpt", "value": "zul"}]
    ids, _ = encode(tokenizer, turns, column="conversations")
    assert tokenizer.decode(ids) == "<|user|>code?</s><|assistant|>zul</s>"


@pytest.mark.parametrize("template", [None, LINES, MARKED])
def test_a_conversation_that_the_assistant_opens_teaches_no_heading(tokenizer: Any, template: str | None) -> None:
    opened = [{"role": "assistant", "content": "hello"}, *CONVERSATION[1:3]]
    assert learnt(with_template(tokenizer, template or tokenizer.chat_template), opened) == "hello</s>zul</s>"


@pytest.mark.parametrize("answer", [{"content": ""}, {"content": None}, {"content": " \n"}])
def test_an_assistant_who_never_says_anything_teaches_nothing(tokenizer: Any, answer: dict[str, Any]) -> None:
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, ["messages"]))
    silent = Row({"messages": [CONVERSATION[1], {"role": "assistant", **answer}]}, "line 1")
    spoken = Row({"messages": CONVERSATION[1:3]}, "line 2")
    assert [document is None for document in encoder.encode([silent, spoken])] == [True, False]


def test_the_call_of_a_tool_is_an_answer_without_words(tokenizer: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "code", "arguments": {}}}]}
    assert learnt(tokenizer, [CONVERSATION[1], call]) == "</s>"


TOOLS = [{"type": "function", "function": {"name": "code", "parameters": {"language": None, "type": "object"}}}]
WITH_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool.function | tojson }}</s>{% endfor %}{% endif %}"


@pytest.mark.parametrize("template", [None, MARKED, LINES], ids=["its own", "marked", "lines"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_the_template_is_told_the_tools_that_may_be_called(tokenizer: Any, tools: Any, template: str | None) -> None:
    """Without what Arrow fills up a record with. The assistant's words are those that they are without tools."""
    knows = with_template(tokenizer, WITH_TOOLS + (template or tokenizer.chat_template))
    spec = DatasetSpec.model_validate({"uri": "s3://bucket/rows.jsonl", "columns": {"tools": "functions"}})
    encoder = Encoder(knows, spec, Columns.detect(spec, ["messages", "functions"]))
    (document,) = encoder.encode([Row({"messages": CONVERSATION, "functions": tools}, "line 1")])
    assert document is not None
    ids, labels = document
    assert knows.decode(ids).startswith('{"name": "code", "parameters": {"type": "object"}}</s>')
    assert knows.decode([label for label in labels if label != IGNORED]) == learnt(knows, CONVERSATION)


@pytest.mark.parametrize("nothing", [None, "", [], "[]", float("nan")])
def test_a_conversation_may_have_no_tools(tokenizer: Any, nothing: Any) -> None:
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, ["messages", "tools"]))
    (document,) = encoder.encode([Row({"messages": CONVERSATION, "tools": nothing}, "line 1")])
    assert document == encode(tokenizer, CONVERSATION)


@pytest.mark.parametrize(
    ("tools", "words"),
    [("[{", "not valid JSON"), ({"name": "code"}, "must be a list of tools"), (["code"], "must be a list of tools")],
)
def test_tools_that_cannot_be_read_are_named(tokenizer: Any, tools: Any, words: str) -> None:
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, ["messages", "tools"]))
    with pytest.raises(StepError, match=f"dataset: line 1: column tools .*{words}") as refused:
        list(encoder.encode([Row({"messages": CONVERSATION, "tools": tools}, "line 1")]))
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_INVALID, "dataset.columns.tools")


def test_parts_that_are_all_text_are_one_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "code of "}, {"type": "text", "text": "zulu?"}]
    ids, _ = encode(tokenizer, [{"role": "user", "content": parts}, CONVERSATION[2]])
    assert tokenizer.decode(ids) == "<|user|>code of zulu?</s><|assistant|>zul</s>"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param("hello", r"column messages is not valid JSON: .*char 0", id="words"),
        pytest.param("[{'role': 'user'}]", "column messages is not valid JSON: .*char 2", id="Python's notation"),
        pytest.param('{"role": "user"}', "must be a list of messages .* as JSON, not dict", id="an object as JSON"),
        pytest.param("[" * 100_000, "column messages: lists and objects are nested too deeply", id="nested JSON"),
        pytest.param([{"from": "bing", "value": "x"}], "role of message 1 in column messages is bing", id="role"),
        pytest.param([{"content": "x"}], "role of message 1 in column messages is missing; .*user", id="no role"),
        pytest.param(
            [{"from": "gpt", "text": "x"}], "message 1 .* neither content nor value; it has from, text", id="key"
        ),
        pytest.param([{"role": "user", "content": [{"type": "image"}]}], "message 1 .* is list, not text", id="image"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(tokenizer: Any, messages: Any, words: str) -> None:
    with pytest.raises(StepError, match=f"dataset: line 1: .*{words}") as refused:
        encode(tokenizer, messages)
    assert (refused.value.reason, refused.value.field) == (Reason.DATASET_INVALID, "dataset.columns.messages")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_of_a_file_may_hold_messages_as_json_text(tokenizer: Any, tmp_path: Path, suffix: str) -> None:
    """As CSV can hold them only so."""
    path = tmp_path / f"rows.{suffix}"
    table = pandas.DataFrame({"messages": [json.dumps(CONVERSATION), "[]", None]})
    match suffix:
        case "csv":
            table.to_csv(path, index=False)
        case "jsonl":
            table.to_json(path, orient="records", lines=True)
        case _:
            table.to_parquet(path)
    encoder = Encoder(tokenizer, SPEC, Columns.detect(SPEC, ["messages"]))
    assert list(encoder.encode(list(read_file(path, path.name)))) == [encode(tokenizer, CONVERSATION), None, None]


def test_fields_that_arrow_left_empty_are_not_given_to_the_template(tokenizer: Any) -> None:
    shows_names = with_template(tokenizer, LINES.replace("{{ message.role }}", "{{ message.name or message.role }}"))
    messages = [{"role": "user", "content": "code?", "name": None}, {"role": "assistant", "content": "zul"}]
    ids, _ = encode(shows_names, messages)
    assert tokenizer.decode(ids) == "user:\ncode?</s>\nassistant:\nzul</s>\n"


def test_a_tokenizer_without_offsets_learns_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encode(tokenizer, CONVERSATION)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode(tokenizer, CONVERSATION) == expected


def test_a_chat_needs_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(StepError, match=r"dataset\.format: the model's tokenizer has no chat template") as refused:
        learnt(with_template(tokenizer, ""), CONVERSATION)
    assert (refused.value.reason, refused.value.field) == (Reason.TEMPLATE_INVALID, "dataset.format")


words = st.text("abz ü三\n", min_size=1, max_size=12).filter(str.strip)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(turns=turns, template=st.sampled_from([MARKED, LINES]))
def test_exactly_what_the_assistant_says_is_learnt(tokenizer: Any, turns: list[tuple[str, str]], template: str) -> None:
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    expected = "".join(f"{answer}</s>" for _, answer in turns)
    assert learnt(with_template(tokenizer, template), messages) == expected
