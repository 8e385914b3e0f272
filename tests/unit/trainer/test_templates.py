"""Prompt templates."""

from __future__ import annotations

import pytest

from qlora_trainer.templates import PromptTemplate
from qlorajob.errors import Reason, StepError


def test_alpaca_has_an_input_section_when_there_is_input() -> None:
    text = PromptTemplate("alpaca").render("Add.", "1 and 2", "3")
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n3"
    )


def test_alpaca_drops_the_input_section_when_the_input_is_empty() -> None:
    text = PromptTemplate("alpaca").render("Say hello.", "", "Hello")
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\nHello"
    )


def test_alpaca_zh_has_the_chinese_headings() -> None:
    assert PromptTemplate("alpaca-zh").render("翻译", "hello", "你好") == (
        "### 指令:\n翻译\n\n### 输入:\nhello\n\n### 回答:\n你好"
    )


def test_alpaca_zh_drops_the_input_section_when_the_input_is_empty() -> None:
    assert PromptTemplate("alpaca-zh").render("问", "", "答") == "### 指令:\n问\n\n### 回答:\n答"


def test_a_prompt_is_the_text_before_the_answer() -> None:
    template = PromptTemplate("Q: {{ instruction }}\nA: {{ output | trim }}</done>")
    assert template.prompt("Why?") == "Q: Why?\nA: "


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ instruction }}\n{{ output | upper }}", "Why?\n"),
        ('{"q": {{ instruction | tojson }}, "a": {{ output | tojson }}}', '{"q": "Why?", "a": "'),
        ("{{ instruction }}: {{ output.split() | join(' ') }}{{ output }}", "Why?: "),
    ],
)
def test_a_template_may_change_the_output(source: str, expected: str) -> None:
    assert PromptTemplate(source).prompt("Why?") == expected


def test_a_template_may_take_rows_apart() -> None:
    assert PromptTemplate("{{ input.split('|')[1] }}: {{ output }}").render("", "a|b", "x") == "b: x"


def test_a_row_that_looks_like_a_template_stays_as_it_is() -> None:
    assert PromptTemplate("{{ instruction }}>{{ output }}").render("{{ 7*7 }}", "", "{% x %}") == "{{ 7*7 }}>{% x %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param("{{ instruction", "not a Jinja template", id="syntax error"),
        pytest.param("{{ instruction }} {{ ouput }}", "'ouput' is undefined", id="unknown variable"),
        pytest.param("{{ instruction }}", "doesn't use output", id="nothing to learn"),
        pytest.param(
            "{% if input %}{{ input }}{{ output }}{% endif %}", "use output where input is empty", id="lost in a branch"
        ),
        pytest.param("{{ instruction }}{% if output == 'x' %}{{ nope[1] }}{% endif %}", "doesn't use output", id="if"),
        pytest.param("alpca", "doesn't use output", id="misspelt name"),
        pytest.param("{{ output.__class__.__mro__ }}", "SecurityError", id="escape from the sandbox"),
        pytest.param("{{ output / 0 }}", "rendering fails", id="error in an expression"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_once(source: str, words: str) -> None:
    with pytest.raises(StepError, match=words) as refused:
        PromptTemplate(source)
    assert (refused.value.reason, refused.value.field) == (Reason.TEMPLATE_INVALID, "dataset.template")
