"""Prompt templates of instruction rows. All are Jinja, rendered in a sandbox: a manifest is no place for code."""

from __future__ import annotations

from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_trainer.chat import common_length
from qlorajob.errors import Reason, StepError

FIELD = "dataset.template"

ALPACA = """\
{% if input %}Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Input:
{{ input }}

### Response:
{{ output }}{% else %}Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Response:
{{ output }}{% endif %}"""

ALPACA_ZH = """\
### 指令:
{{ instruction }}

{% if input %}### 输入:
{{ input }}

{% endif %}### 回答:
{{ output }}"""

BUILT_IN = {"alpaca": ALPACA, "alpaca-zh": ALPACA_ZH}

KNOWN = frozenset({"instruction", "input", "output"})
_ANSWERS = ("0", "1")
"""Two outputs that differ from their first character on, and that filters such as upper or tojson keep different: what
the template makes of both before it differs is the prompt."""


class PromptTemplate:
    """Turns instruction, input and output into the text to learn, or into the prompt alone.

    `parts` are those of the three that the template uses.
    """

    def __init__(self, source: str) -> None:
        """Raises StepError when the template can't be used for any row."""
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        text = BUILT_IN.get(source, source)
        try:
            self._template: Template = environment.from_string(text)
            self.parts = frozenset(meta.find_undeclared_variables(environment.parse(text)))
        except TemplateError as error:
            message = f"{FIELD}: not a Jinja template: {error} (line {getattr(error, 'lineno', '?')})"
            raise StepError(Reason.TEMPLATE_INVALID, message, field=FIELD) from None
        unknown = ", ".join(sorted(self.parts - KNOWN - environment.globals.keys()))
        for input_text in ("input", ""):
            try:
                answered = self._answered("instruction", input_text)
            except StepError as error:
                # Some templates take rows apart, and rows that are made up don't have the parts.
                if not unknown and "output" in self.parts and "has no element" in error.message:
                    continue
                raise
            if answered[0] == answered[1]:
                where = "" if input_text else " where input is empty"
                message = (
                    f"{FIELD}: the template doesn't use output{where}, so there would be nothing to learn; "
                    f"write alpaca, alpaca-zh or a Jinja template with {{{{ instruction }}}} and {{{{ output }}}}"
                )
                raise StepError(Reason.TEMPLATE_INVALID, message, field=FIELD)

    def render(self, instruction: str, input_text: str, output: str, where: str = "") -> str:
        """The whole text of a row. `where` says to messages which one."""
        values: dict[str, Any] = {"instruction": instruction, "input": input_text, "output": output}
        place = f" ({where})" if where else ""
        try:
            return self._template.render(values)
        except UndefinedError as error:
            message = f"{FIELD}: {error}{place}; a template knows instruction, input and output"
        except Exception as error:  # a template can fail in any way Python can
            message = f"{FIELD}: rendering fails: {type(error).__name__}: {error}{place}"
        raise StepError(Reason.TEMPLATE_INVALID, message, field=FIELD)

    def _answered(self, instruction: str, input_text: str, where: str = "") -> tuple[str, str]:
        one, other = (self.render(instruction, input_text, answer, where) for answer in _ANSWERS)
        return one, other

    def prompt(self, question: str) -> str:
        """The text up to where the answer goes. The question is input where the template has its own instruction."""
        instruction, input_text = (question, "") if "instruction" in self.parts else ("", question)
        one, other = self._answered(instruction, input_text, "a prompt of evaluation.prompts")
        return one[: common_length(one, other)]
