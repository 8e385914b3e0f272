"""From a row of a dataset to a document: token ids, and which of them are learnt.

text               every token
instruction        every token of the filled-in template, prompt included, as the reference recipes do
prompt-completion  the completion only, as TRL does; where both are messages, the assistant's turns in the completion
chat               the assistant's turns, each up to its end
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_trainer.chat import (
    FIELD,
    PROMPT_FIELD,
    ChatRenderer,
    Message,
    Span,
    common_length,
    holds_messages,
    messages_of,
    prompt_and_completion_of,
    says_something,
    tokens_within,
    tools_of,
)
from qlora_trainer.rows import Row
from qlora_trainer.templates import PromptTemplate
from qlorajob.errors import Reason, StepError
from qlorajob.spec import DatasetSpec

Format = Literal["text", "instruction", "prompt-completion", "conversational prompt-completion", "chat"]
"""Those of the manifest, and what prompt-completion is where both are messages: the rows tell."""

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer"),
    "text": ("text",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools",),
}
ASKED_BY: dict[Format, str] = {"chat": FIELD, "conversational prompt-completion": PROMPT_FIELD}
"""Formats that the chat template puts into text, and the field of the column that it starts with."""
REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Parts that a format needs, in the order that `auto` tries them: a text column beside others is made from them."""
Tokens = list[int]
Encoded = tuple[Tokens, Tokens]
"""Input ids and labels."""
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Columns:
    """The format of a dataset, and the column that plays each part."""

    format: Format
    names: dict[str, str]
    needed: tuple[str, ...] = ()
    """Columns without which no row can be read."""

    @classmethod
    def detect(cls, spec: DatasetSpec, present: Sequence[str], rows: Iterable[Row] = ()) -> Columns:
        """Find format and columns among those that are there. Raises StepError when one is missing.

        The first of the rows with a prompt says whether prompts are text or messages.
        """
        required = _required(spec)
        found = {part: name for part in USUAL_NAMES if (name := _column(part, spec, present)) is not None}
        # With auto, a format whose columns the manifest names is tried before those that are merely there.
        for format_, parts in sorted(required.items(), key=lambda item: not _is_named(spec, item[1])):
            if spec.format == format_:
                absent = [part for part in parts if part not in found]
                if absent:
                    raise _missing(absent[0], f"format {format_} needs a column {absent[0]}", present)
            if spec.format in (format_, "auto") and all(part in found for part in parts):
                needed = tuple(found[part] for part in parts)
                conversational = format_ == "prompt-completion" and _hold_messages(rows, *needed)
                return cls("conversational prompt-completion" if conversational else format_, found, needed)
        message = (
            f"dataset.format: can't tell the format from the columns {', '.join(present)}; "
            "name them in dataset.columns, or set dataset.format"
        )
        raise StepError(Reason.COLUMN_MISSING, message, field="dataset.format")

    def text(self, row: Row, part: str) -> str:
        """The part of a row as text: empty where there is none, for which pandas writes NaN."""
        name = self.names.get(part)
        value = row.values.get(name) if name is not None else None
        if name is None or value is None or value != value:
            return ""
        if isinstance(value, str | int | float):
            return _whole(str(value), row, name)
        message = f"dataset: {row.where}: column {name} holds {type(value).__name__}, not text"
        raise StepError(Reason.DATASET_INVALID, message, field=f"dataset.columns.{part}")


class Encoder:
    """Turns rows into documents with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, spec: DatasetSpec, columns: Columns) -> None:
        self.columns = columns
        self._tokenizer = tokenizer
        self._template = PromptTemplate(spec.template) if columns.format == "instruction" else None
        asked_by = ASKED_BY.get(columns.format)
        self._chat = ChatRenderer(tokenizer, asked_by) if asked_by else None

    def encode(self, rows: Sequence[Row]) -> Iterable[Encoded | None]:
        """Input ids and labels of each row, or None where there is nothing to learn."""
        if self._chat is not None:
            return self._conversations(rows, self._chat)
        if self.columns.format == "prompt-completion":
            return self._prompt_completion(rows)
        return self._whole_text(rows)

    def prompt_ids(self, prompt: str) -> Tokens:
        """A prompt of spec.evaluation, put as the training rows were."""
        text = self.prompt_text(prompt)
        return self._tokenizer(text, add_special_tokens=self._chat is None)["input_ids"]  # type: ignore[no-any-return]

    def prompt_text(self, prompt: str) -> str:
        """The text that the model really reads for a prompt: what one needs to ask it again elsewhere."""
        if self._chat is not None:
            return self._chat.question(prompt)
        return self._template.prompt(prompt) if self._template is not None else prompt

    def _whole_text(self, rows: Sequence[Row]) -> Iterable[Encoded | None]:
        texts = [self._text(row) for row in rows]
        for text, ids in zip(texts, self._tokenize(texts), strict=True):
            yield (ids, list(ids)) if text else None

    def _text(self, row: Row) -> str:
        columns = self.columns
        if self._template is None:
            text = columns.text(row, "text")
            return text if text.strip() else ""
        output = columns.text(row, "output")
        instruction, input_text = columns.text(row, "instruction"), columns.text(row, "input")
        # A template with an instruction of its own asks something even where the input is empty.
        asks = bool((instruction + input_text).strip()) or "instruction" not in self._template.parts
        return self._template.render(instruction, input_text, output, row.where) if asks and output.strip() else ""

    def _prompt_completion(self, rows: Sequence[Row]) -> Iterable[Encoded | None]:
        prompts = [self.columns.text(row, "prompt") for row in rows]
        completions = [self.columns.text(row, "completion") for row in rows]
        together = self._tokenize(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        )
        alone = self._tokenizer(prompts)["input_ids"] if prompts else []
        for completion, ids, prompt_ids in zip(completions, together, alone, strict=True):
            start = common_length(prompt_ids, ids)  # tokens may merge across the border
            yield (ids, [IGNORED] * start + ids[start:]) if completion.strip() else None

    def _conversations(self, rows: Sequence[Row], chat: ChatRenderer) -> Iterable[Encoded | None]:
        rendered = [self._conversation(row, chat) for row in rows]
        if not rendered:
            return
        columns = " or ".join(self.columns.needed)
        texts = [_whole(text, row, columns) for (text, _), row in zip(rendered, rows, strict=True)]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=self._tokenizer.is_fast)
        offsets = encoded.get("offset_mapping") or [None] * len(texts)
        for (text, spans), ids, places in zip(rendered, encoded["input_ids"], offsets, strict=True):
            learnt = tokens_within(self._tokenizer, text, ids, places, spans)
            labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
            yield (ids, labels) if any(learnt) else None

    def _conversation(self, row: Row, chat: ChatRenderer) -> tuple[str, list[Span]]:
        """The text of a conversation and which parts of it are learnt: of what the assistant only answers to, none."""
        asked: list[Message] = []
        if self.columns.format == "chat":
            answered = messages_of(row, *self.columns.needed)
        else:
            asked, answered = prompt_and_completion_of(row, *self.columns.needed)
        tools = tools_of(row, self.columns.names.get("tools"))
        if not any(map(says_something, answered)):
            return "", []
        return chat.conversation([*asked, *answered], row.where, tools, asked=len(asked))

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        """Token ids with the end-of-text token last, so that the model learns to stop."""
        if not texts:
            return []
        end = self._tokenizer.eos_token_id
        return [ids if ids and ids[-1] == end else [*ids, end] for ids in self._tokenizer(texts)["input_ids"]]


def _whole(text: str, row: Row, column: str) -> str:
    """The text, unless JSON's escapes left half of a character in it, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        message = f"dataset: {row.where}: column {column} holds {half}, half of a character: mend or drop it"
        raise StepError(Reason.DATASET_INVALID, message, field="dataset.uri") from None
    return text


def _hold_messages(rows: Iterable[Row], prompt: str, completion: str) -> bool:
    """Whether prompts and completions are messages. JSON in a completion alone may be text that is to be learnt."""
    for row in rows:
        asked, answer = row.values.get(prompt), row.values.get(completion)
        if asked or isinstance(answer, list):
            return holds_messages(asked) or isinstance(answer, list)
    return False


def _required(spec: DatasetSpec) -> dict[Format, tuple[str, ...]]:
    """REQUIRED, but that a template with an instruction built in asks for the input instead of an instruction."""
    if spec.format not in ("auto", "instruction"):
        return REQUIRED
    asked = "instruction" if "instruction" in PromptTemplate(spec.template).parts else "input"
    return REQUIRED | {"instruction": (asked, "output")}


def _column(part: str, spec: DatasetSpec, present: Sequence[str]) -> str | None:
    """The column for a part: the one the manifest names, which must be there, else one of the usual names."""
    named: str | None = getattr(spec.columns, part)
    if named is not None:
        if named not in present:
            raise _missing(part, f"there is no column {named}", present)
        return named
    return next((name for name in USUAL_NAMES[part] if name in present), None)


def _is_named(spec: DatasetSpec, parts: tuple[str, ...]) -> bool:
    return any(getattr(spec.columns, part) for part in parts)


def _missing(part: str, problem: str, present: Sequence[str]) -> StepError:
    message = f"dataset.columns.{part}: {problem}; the dataset has {', '.join(present[:40]) or 'none'}"
    return StepError(Reason.COLUMN_MISSING, message, field=f"dataset.columns.{part}")
