"""A whole QLoRAJob object, and the one way in: `parse` checks what the CRD checks and reports every problem at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from qlorajob.base import ContractModel, models_in, prune_nulls, refuse
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import QLoRAJobStatus

NAME_MAX_LENGTH = 63
"""The name is the value of a label on the job's children; the CRD has a rule for it."""


class InvalidManifest(ValueError):  # noqa: N818 (it is what the manifest is)
    """The object is no valid QLoRAJob. `problems` has one line for each: `spec.lora.rank: must be …`."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Metadata(ContractModel):
    """What the operator uses of metadata; the rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=NAME_MAX_LENGTH)]
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    annotations: Annotated[Mapping[str, str], BeforeValidator(lambda value: value or {})] = {}
    deletion_timestamp: AwareDatetime | None = None
    finalizers: Annotated[tuple[str, ...], BeforeValidator(lambda value: value or ())] = ()


def _status(value: Any) -> Any:
    """Fields that another version of the operator wrote are dropped, as the API server does on its next write."""
    if not isinstance(value, Mapping):
        return value
    try:
        return QLoRAJobStatus.model_validate(prune_nulls(value), extra="ignore")
    except ValidationError as error:
        raise refuse("; ".join(_explain(error))) from None


class QLoRAJob(ContractModel):
    """A QLoRAJob as the API server stores it: parsed once, frozen after."""

    api_version: Literal["qlora.dev/v1alpha1"] = "qlora.dev/v1alpha1"
    kind: Literal["QLoRAJob"] = "QLoRAJob"
    metadata: Metadata
    spec: QLoRAJobSpec
    status: Annotated[QLoRAJobStatus, BeforeValidator(_status)] = QLoRAJobStatus()


def parse(obj: Mapping[str, Any], local: bool = False) -> QLoRAJob:
    """The QLoRAJob in `obj`, a JSON object. With `local`, `file://` URIs are allowed (`qlora run`).

    Raises:
        InvalidManifest: with every problem, a line each.
    """
    try:
        return QLoRAJob.model_validate(prune_nulls(obj), context={"local": local})
    except ValidationError as error:
        raise InvalidManifest(tuple(_explain(error))) from None


def _explain(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        yield f"{_path(detail['loc']) or 'manifest'}: {_message(detail)}"


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


MESSAGES = {
    "missing": "is required",
    "bool_type": "must be true or false, not {input}",
    "float_type": "must be a number, not {input}",
    "string_type": "must be a string, not {input}",
    "literal_error": "must be {expected}, not {input}",
    "greater_than": "must be greater than {gt:g}, not {input}",
    "greater_than_equal": "must be at least {ge:g}, not {input}",
    "less_than": "must be less than {lt:g}, not {input}",
    "less_than_equal": "must be at most {le:g}, not {input}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "model_type": "must hold fields, not {input}",
    "model_attributes_type": "must hold fields, not {input}",
    "dict_type": "must hold names and values, not {input}",
    "mapping_type": "must hold names and values, not {input}",
    "tuple_type": "must be a list, not {input}",
}
"""pydantic's error types in a user's words; what isn't here is already said well by pydantic or by our markers."""


def _message(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown field{_suggestion(detail['loc'])}"
    template = MESSAGES.get(detail["type"])
    if template is None:
        given = detail["input"]  # a string may hold a credential
        echo = detail["type"] == "qlora" and _is_scalar(given) and not isinstance(given, str)
        return f"{detail['msg']}, not {_shown(given)}" if echo else detail["msg"]
    quotes = ": put it in quotes" if template == MESSAGES["string_type"] and _is_scalar(detail["input"]) else ""
    return template.format(input=_shown(detail["input"]), **detail.get("ctx", {})) + quotes


def _is_scalar(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping | list | tuple)


def _shown(value: Any) -> str:
    """The value as the user would recognise it, without filling the screen."""
    if isinstance(value, Mapping):
        return "fields"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggestion(location: tuple[int | str, ...]) -> str:
    """`, did you mean rank?` where a field of the model that holds the unknown one has a similar name."""
    model: Any = QLoRAJob
    for part in location[:-1]:
        if isinstance(part, str) and (model := _submodel(model, part)) is None:
            return ""
    names = [field.alias or name for name, field in model.model_fields.items()]
    close = get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known fields: {', '.join(names)}"


def _submodel(model: type[BaseModel], alias: str) -> type[BaseModel] | None:
    field = next((field for field in model.model_fields.values() if field.alias == alias), None)
    return next(models_in(field.annotation), None) if field else None
