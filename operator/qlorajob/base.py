"""What every contract model shares: camelCase on the wire, frozen in memory, unknown fields refused.

A rule across fields is written once, as a `Rule` that carries both its CEL expression (for the API server) and its
Python predicate (for `qlora run` and the operator), so the CRD and the models can't drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint across the fields of one model, in CEL and in Python.

    `cel` is evaluated by the API server with `self` bound to the object after defaulting; `holds` gets the validated
    model. `message` names the fields and says what to do.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


class ContractModel(BaseModel):
    """Base of every model that crosses a process boundary: status, run config, report, manifest.

    The docstring below a field is its description; `qlorajob.crd` reads it from the source, to keep imports fast.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        protected_namespaces=(),
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON object as Kubernetes and S3 hold it: camelCase, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class SpecModel(ContractModel):
    """Base of what users write: camelCase names only, strict types, and rules across fields."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True, strict=True)

    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _prune_nulls(cls, value: Any) -> Any:
        """The API server prunes nulls before defaulting, so `maxSteps: null` means "not set" here too."""
        return prune_nulls(value, {field.alias for field in cls.model_fields.values()})

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule.message for rule in self.RULES if not rule.holds(self)]
        if broken:
            raise refuse("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.RULES:
            schema["x-kubernetes-validations"] = [{"rule": rule.cel, "message": rule.message} for rule in cls.RULES]
        return schema


def prune_nulls(value: Any, keys: Container[str | None] | None = None) -> Any:
    """A mapping without its null entries (of `keys`, if given: an unknown field stays one); else the value as it is."""
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if item is not None or (keys is not None and key not in keys)}


def refuse(message: str) -> PydanticCustomError:
    """The error with which a validator refuses a value; users read `message` as it stands."""
    return PydanticCustomError("qlora", "{message}", {"message": message})


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's type mentions: X of `X`, `X | None` and `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)
