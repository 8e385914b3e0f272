"""Conversations: put into text by the tokenizer's chat template; and which characters of that the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np

from qlora_trainer.rows import Row, is_message
from qlorajob.errors import Reason, StepError, first_line

FIELD = "dataset.columns.messages"
TOOLS_FIELD = "dataset.columns.tools"
PROMPT_FIELD, COMPLETION_FIELD = "dataset.columns.prompt", "dataset.columns.completion"
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
Tools = list[dict[str, Any]]
"""What the assistant may call: JSON schemas of functions, as the chat template takes them."""
Span = tuple[int, int]


def holds_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or that as JSON, where it could be plain text as well."""
    if not isinstance(value, str):
        return isinstance(value, list)
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and is_message(turns[0])


def prompt_and_completion_of(row: Row, prompt: str, completion: str) -> tuple[list[Message], list[Message]]:
    """The messages of two columns, the first of which the assistant is to answer. Raises StepError."""
    asked, answer = messages_of(row, prompt, PROMPT_FIELD), messages_of(row, completion, COMPLETION_FIELD)
    if asked and asked[-1]["role"] == "assistant":
        problem = f"column {prompt} ends with what the assistant says: move that to column {completion}"
        raise _refused_row(row, problem, PROMPT_FIELD)
    return asked, answer


def messages_of(row: Row, column: str, field: str = FIELD) -> list[Message]:
    """Messages with role and content, from those or from ShareGPT's from and value. Raises StepError."""
    turns = _value(row, column, field, "messages") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        kind = "" if isinstance(turns, list) else f", not {type(turns).__name__}"
        raise _refused_row(
            row, f"column {column} must be a list of messages with role and content, or that as JSON{kind}", field
        )
    return [
        _message(turn, f"message {number} in column {column}", row, field) for number, turn in enumerate(turns, start=1)
    ]


def _message(turn: dict[str, Any], name: str, row: Row, field: str) -> Message:
    """What else a message holds, such as tool_calls, is for the chat template."""
    rest = {key: value for key, value in _filled(turn).items() if key not in ("from", "value")}
    role = turn.get("role") or turn.get("from")
    if role not in tuple(ROLES):  # compared, not looked up: it may be anything
        raise _refused_row(row, f"the role of {name} is {_shown(role)}; it must be one of {', '.join(ROLES)}", field)
    if not turn.keys() & {"content", "value", "tool_calls"}:
        raise _refused_row(row, f"{name} has neither content nor value; it has {', '.join(turn)}", field)
    content = turn.get("content")
    content = _text(turn.get("value") or "" if content is None else content)
    if not isinstance(content, str):
        raise _refused_row(row, f"the content of {name} is {type(content).__name__}, not text", field)
    return rest | {"role": ROLES[role], "content": content}


def tools_of(row: Row, column: str | None) -> Tools | None:
    """The tools of a conversation, a list or that as JSON; None where it has none. Raises StepError."""
    found = _value(row, column, TOOLS_FIELD, "tools") if column is not None else None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _refused_row(row, f"column {column} must be a list of tools, or that as JSON", TOOLS_FIELD)
    return [_filled(tool) for tool in found]


def _value(row: Row, column: str, field: str, what: str) -> Any:
    """What stands in a column: a list, or that as JSON, as in CSV. None where there is nothing. Raises StepError."""
    found = row.values.get(column)
    if found != found:  # NaN is how pandas writes nothing
        return None
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found) if found.strip() else None
    except RecursionError:
        raise _refused_row(row, f"column {column}: lists and objects are nested too deeply", field) from None
    except ValueError as error:
        problem = f"column {column} is not valid JSON: {error}; give a list of {what}, or that as JSON"
        raise _refused_row(row, problem, field) from None


def _filled(value: Any) -> Any:
    """Without the keys that Arrow adds to each record of a column because another record has them."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _text(content: Any) -> Any:
    """The parts of a message as one text, where all are text (`[{"type": "text", "text": ...}]`); else as it was."""
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return content
    return "".join(part["text"] for part in content)


def says_something(message: Message) -> bool:
    """Whether there is anything to learn of what the assistant says here: words, thoughts, the call of a tool."""
    said = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    return message["role"] == "assistant" and bool(said)


def _shown(value: Any) -> str:
    return "missing" if value is None else str(value)[:40]


def _refused_row(row: Row, problem: str, field: str) -> StepError:
    return StepError(Reason.DATASET_INVALID, f"dataset: {row.where}: {problem}", field=field)


PROBE: list[Message] = [
    {"role": role, "content": content}
    for role, content in (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
]


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template."""

    def __init__(self, tokenizer: Any, field: str = FIELD) -> None:
        """`field` is what messages name. Raises StepError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            message = "dataset.format: the model's tokenizer has no chat template; give the data in another format"
            raise StepError(Reason.TEMPLATE_INVALID, message, field="dataset.format")
        self._tokenizer, self._field = tokenizer, field

    def question(self, question: str) -> str:
        """The text after which the assistant answers a question."""
        messages = [{"role": "user", "content": question}]
        return self._render(messages, where="a prompt of evaluation.prompts", add_generation_prompt=True)

    def conversation(
        self, messages: list[Message], where: str, tools: Tools | None = None, *, asked: int = 0
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans of it that the assistant says, up to the end of each turn.

        The first `asked` messages are a prompt, of which nothing counts.
        """
        text, spans = self._spoken(messages, where, tools, asked)
        if spans and messages[-1]["role"] == "assistant" and self._leaves_turns_open:
            start, end = spans[-1]
            text = text[:end] + self._tokenizer.eos_token
            spans = [*spans[:-1], (start, len(text))]
        return text, spans

    def _spoken(
        self, messages: list[Message], where: str, tools: Tools | None = None, asked: int = 0
    ) -> tuple[str, list[Span]]:
        """What the template makes of it."""
        if self._marked_template is not None:
            text, spans = self._marked(messages, where, self._marked_template, tools)
            if any(message["role"] == "assistant" for message in messages[:asked]):
                spans = spans[len(self._marked(messages[:asked], where, self._marked_template, tools)[1]) :]
            return text, spans
        text = self._render(messages, where, tools=tools)
        return text, self._spans_by_prefix(messages, text, where, tools, asked)

    @cached_property
    def _leaves_turns_open(self) -> bool:
        """Whether nothing tells that an answer ends here: the model would never learn to stop."""
        try:
            text, _ = self._spoken(PROBE[:2], where="a probe")
        except StepError:  # a template that wants more than that
            return False
        return text.rstrip().endswith(PROBE[1]["content"])

    @cached_property
    def _marked_template(self) -> str | None:
        """A chat template that marks what the assistant says with {% generation %}, where there is one.

        The tokenizer's own; or, where that rewrites earlier turns, TRL's version of it: Qwen3's takes the reasoning out
        of the history, for example.
        """
        own: str = self._tokenizer.get_chat_template()
        if GENERATION.search(own):
            return own
        try:
            self._spans_by_prefix(PROBE, self._render(PROBE, where="a probe"), where="a probe")
        except StepError:
            return _trl_version(self._tokenizer)
        return None

    def _marked(
        self, messages: list[Message], where: str, template: str, tools: Tools | None
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # Jinja's errors, and whatever raise_exception() raises
            raise self._refused(where, error) from None
        return texts[0], spans[0]

    def _spans_by_prefix(
        self, messages: list[Message], text: str, where: str, tools: Tools | None = None, asked: int = 0
    ) -> list[Span]:
        """A turn of the assistant is what the text has more than it would have if the turn were still to come."""
        spans = []
        for number, message in enumerate(messages):
            if number < asked or message["role"] != "assistant":
                continue
            start = self._start(messages[:number], text, where, tools)
            upto = self._render(messages[: number + 1], where, tools=tools)
            if start is None or not text.startswith(upto):
                problem = (
                    "dataset.format: the model's chat template writes a turn differently when another one follows, so "
                    f"the assistant's words can't be told apart ({where}); use a tokenizer whose template marks them "
                    "with {% generation %}, or give prompt and completion as text"
                )
                raise StepError(Reason.TEMPLATE_INVALID, problem, field="dataset.format")
            end = len(upto.rstrip())  # a line break after the end of a turn belongs to the template
            if end > start:
                spans.append((start, end))
        return spans

    def _start(self, before: list[Message], text: str, where: str, tools: Tools | None) -> int | None:
        """Where the assistant's turn starts, after its heading; None if `text` doesn't go on from the turns before."""
        if not before:
            return text.index(self._heading) + len(self._heading) if self._heading in text else 0
        if not text.startswith(self._render(before, where, tools=tools)):
            return None
        asked = self._render(before, where, tools=tools, add_generation_prompt=True)
        return common_length(asked, text)

    @cached_property
    def _heading(self) -> str:
        """What the template puts before the words of the assistant."""
        asked, answered = self._render(PROBE[:1], where="a probe"), self._render(PROBE[:2], where="a probe")
        upto = common_length(self._render(PROBE[:1], where="a probe", add_generation_prompt=True), answered)
        return answered[len(asked) : upto]

    def _render(self, messages: list[Message], where: str, **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)  # type: ignore[no-any-return]
        except Exception as error:  # Jinja's errors, and whatever raise_exception() raises
            raise self._refused(where, error) from None

    def _refused(self, where: str, error: Exception) -> StepError:
        message = f"dataset: {where}: the chat template refuses it: {first_line(error)}"
        return StepError(Reason.DATASET_INVALID, message, field=self._field)


def _trl_version(tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)  # type: ignore[no-any-return]
    except Exception:  # it doesn't know the template; or tries it, and a template can fail in any way
        return None


def tokens_within(tokenizer: Any, text: str, ids: list[int], offsets: Any, spans: list[Span]) -> list[bool]:
    """Which tokens of a text lie in the spans of characters, at least with a part.

    `offsets` are those that a fast tokenizer gives. Without them, a border is where the tokens of the text up to it
    part from those of the whole text.
    """
    learnt = np.zeros(len(ids), bool)
    if offsets is not None:
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        for start, end in spans:
            learnt |= (starts < end) & (ends > start)
    else:
        for span in spans:
            first, last = (
                common_length(tokenizer(text[:border], add_special_tokens=False)["input_ids"], ids) for border in span
            )
            learnt[first:last] = True
    return learnt.tolist()


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common from their start."""
    return sum(1 for _ in takewhile(bool, (a == b for a, b in zip(one, other, strict=False))))
