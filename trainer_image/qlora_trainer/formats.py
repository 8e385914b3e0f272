"""From a row of a dataset to a document: token ids, and which of them are learnt.

text               every token
instruction        every token of the filled-in template, prompt included, as the reference recipes do
prompt-completion  the completion only, as TRL does
chat               the assistant's turns where the chat template marks them ({% generation %}), else every token
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_trainer.rows import RawData, Row
from qlora_trainer.templates import PromptTemplate
from qlorajob.errors import Reason, StepError
from qlorajob.spec import DatasetSpec

Format = Literal["text", "instruction", "prompt-completion", "chat"]

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer"),
    "text": ("text",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "messages": ("messages", "conversations", "conversation"),
}
REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Parts that a format needs, in the order that `auto` tries them: a text column beside others is made from them."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

Tokens = list[int]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Columns:
    """The format of a dataset, and the column that plays each part."""

    format: Format
    names: dict[str, str]

    @classmethod
    def detect(cls, spec: DatasetSpec, data: RawData) -> Columns:
        """Find format and columns in the data. Raises StepError when one is missing."""
        present = data.columns
        found = {part: name for part in USUAL_NAMES if (name := _column(part, spec, present)) is not None}
        # With auto, a format whose columns the manifest names is tried before those that are merely there.
        for format_, parts in sorted(REQUIRED.items(), key=lambda item: not _is_named(spec, item[1])):
            if spec.format == format_:
                absent = [part for part in parts if part not in found]
                if absent:
                    raise _missing(absent[0], f"format {format_} needs a column {absent[0]}", present)
            if spec.format in (format_, "auto") and all(part in found for part in parts):
                return cls(format_, found)
        message = (
            f"dataset.format: can't tell the format from the columns {', '.join(present)}; "
            "name them in dataset.columns, or set dataset.format"
        )
        raise StepError(Reason.COLUMN_MISSING, message, field="dataset.format")

    def text(self, row: Row, part: str) -> str:
        """The part of a row as text: empty when it isn't there."""
        value = row.values.get(self.names.get(part, ""))
        if value is None:
            return ""
        if isinstance(value, str | int | float):
            return str(value)
        message = f"dataset: {row.where}: column {self.names[part]} holds {type(value).__name__}, not text"
        raise StepError(Reason.DATASET_INVALID, message, field=f"dataset.columns.{part}")


class Encoder:
    """Turns rows into documents with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, spec: DatasetSpec, columns: Columns) -> None:
        self.columns = columns
        self._tokenizer = tokenizer
        self._template = PromptTemplate(spec.template) if columns.format == "instruction" else None
        if columns.format == "chat" and not tokenizer.chat_template:
            message = "dataset.format: the model's tokenizer has no chat template; give the data in another format"
            raise StepError(Reason.TEMPLATE_INVALID, message, field="dataset.format")
        self.assistant_only = columns.format == "chat" and "{% generation" in str(tokenizer.chat_template)

    def encode(self, rows: Sequence[Row]) -> Iterable[tuple[Tokens, Tokens] | None]:
        """(input ids, labels) of each row, or None where there is nothing to learn."""
        if self.columns.format == "chat":
            return (self._chat(row) for row in rows)
        if self.columns.format == "prompt-completion":
            return self._prompt_completion(rows)
        return self._whole_text(rows)

    def prompt_ids(self, prompt: str) -> Tokens:
        """A prompt of spec.evaluation, put as the training rows were."""
        if self.columns.format == "chat":
            messages = [{"role": "user", "content": prompt}]
            return self._apply_chat_template(messages, add_generation_prompt=True)["input_ids"]  # type: ignore[no-any-return]
        return self._tokenizer(self.prompt_text(prompt))["input_ids"]  # type: ignore[no-any-return]

    def prompt_text(self, prompt: str) -> str:
        """The text that the model really reads for a prompt: what one needs to ask it again elsewhere."""
        if self.columns.format == "chat":
            messages = [{"role": "user", "content": prompt}]
            return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                messages, add_generation_prompt=True, tokenize=False
            )
        return self._template.prompt(prompt) if self._template is not None else prompt

    def _whole_text(self, rows: Sequence[Row]) -> Iterable[tuple[Tokens, Tokens] | None]:
        texts = [self._text(row) for row in rows]
        for text, ids in zip(texts, self._tokenize(texts), strict=True):
            yield (ids, list(ids)) if text else None

    def _text(self, row: Row) -> str:
        columns = self.columns
        if self._template is None:
            text = columns.text(row, "text")
            return text if text.strip() else ""
        output = columns.text(row, "output")
        if not output.strip():
            return ""
        return self._template.render(columns.text(row, "instruction"), columns.text(row, "input"), output)

    def _prompt_completion(self, rows: Sequence[Row]) -> Iterable[tuple[Tokens, Tokens] | None]:
        prompts = [self.columns.text(row, "prompt") for row in rows]
        completions = [self.columns.text(row, "completion") for row in rows]
        together = self._tokenize(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        )
        alone = self._tokenizer(prompts)["input_ids"] if prompts else []
        for completion, ids, prompt_ids in zip(completions, together, alone, strict=True):
            # Tokens may merge across the border, so the completion starts where the two tokenizations part.
            start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
            yield (ids, [IGNORED] * start + ids[start:]) if completion.strip() else None

    def _chat(self, row: Row) -> tuple[Tokens, Tokens] | None:
        messages = _messages(row, self.columns.names["messages"])
        if not messages:
            return None
        encoded = self._apply_chat_template(messages, return_assistant_tokens_mask=self.assistant_only)
        ids = encoded["input_ids"]
        if not self.assistant_only:
            return ids, list(ids)
        mask = encoded["assistant_masks"]
        return ids, [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)]

    def _apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, return_dict=True, **options)
        except Exception as error:  # Jinja's errors, and whatever raise_exception() raises
            message = f"dataset: the model's chat template refuses a row: {str(error).strip().splitlines()[0]}"
            raise StepError(Reason.DATASET_INVALID, message, field="dataset.columns.messages") from None

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        """Token ids with the end-of-text token last, so that the model learns to stop."""
        if not texts:
            return []
        end = self._tokenizer.eos_token_id
        return [ids if ids and ids[-1] == end else [*ids, end] for ids in self._tokenizer(texts)["input_ids"]]


def _column(part: str, spec: DatasetSpec, present: list[str]) -> str | None:
    """The column for a part: the one the manifest names, which must be there, else one of the usual names."""
    named: str | None = getattr(spec.columns, part)
    if named is not None:
        if named not in present:
            raise _missing(part, f"there is no column {named}", present)
        return named
    return next((name for name in USUAL_NAMES[part] if name in present), None)


def _is_named(spec: DatasetSpec, parts: tuple[str, ...]) -> bool:
    return any(getattr(spec.columns, part) for part in parts)


def _missing(part: str, problem: str, present: list[str]) -> StepError:
    message = f"dataset.columns.{part}: {problem}; the dataset has {', '.join(present[:40]) or 'none'}"
    return StepError(Reason.COLUMN_MISSING, message, field=f"dataset.columns.{part}")


def _messages(row: Row, column: str) -> list[dict[str, str]]:
    """Messages with role and content, from those or from ShareGPT's from and value."""
    value = row.values.get(column) or []
    try:
        return [
            {"role": ROLES[turn.get("role") or turn["from"]], "content": turn.get("content") or turn.get("value") or ""}
            for turn in value
        ]
    except (AttributeError, KeyError, TypeError):
        message = f"dataset: {row.where}: column {column} must be a list of messages with role and content"
        raise StepError(Reason.DATASET_INVALID, message, field="dataset.columns.messages") from None
