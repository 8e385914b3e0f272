"""Field types that more than one part of the spec uses, each with the words a user reads when the value is wrong.

Every marker here validates in Python and adds the same check to the JSON schema, as CEL where that gives a better
message than JSON schema would (`pattern` shows the user a regular expression, not what to write). Messages say what
to write and leave the field's path to whoever prints them: the API server and `qlorajob.resource` both put it first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from qlorajob.base import prune_nulls, refuse

VALIDATIONS = "x-kubernetes-validations"


def _compile(pattern: str) -> re.Pattern[str]:
    """The pattern with RE2's meaning: `$` is the end of the text (not before a last newline), classes are ASCII."""
    return re.compile(re.sub(r"\$$", r"\\Z", pattern), re.ASCII)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _with_rule(schema: JsonSchemaValue, rule: str, message: str) -> JsonSchemaValue:
    return schema | {VALIDATIONS: [*schema.get(VALIDATIONS, []), {"rule": rule, "message": message}]}


@dataclass(frozen=True, slots=True)
class Matches:
    """A string must match `pattern` (RE2 syntax, searched), else the user reads `message`.

    `local_pattern` is allowed too under the validation context `{"local": True}`, that is for `qlora run`. With
    `never`, the string must not match.
    """

    pattern: str
    message: str
    local_pattern: str | None = None
    never: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        pattern, local_pattern = _compile(self.pattern), self.local_pattern and _compile(self.local_pattern)

        def check(value: str, info: ValidationInfo) -> str:
            if bool(pattern.search(value)) != self.never:
                return value
            if local_pattern and (info.context or {}).get("local"):
                if local_pattern.search(value):
                    return value
                raise refuse(f"{self.message}; or file:///path, in a local run")
            raise refuse(self.message)

        return core_schema.with_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _with_rule(handler(core), f"{'!' * self.never}self.matches(r'{self.pattern}')", self.message)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a map of strings must match `pattern`. CEL, since a structural schema can't constrain keys."""

    pattern: str
    max_length: int
    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        allowed = _compile(self.pattern)

        def check(value: Mapping[str, str]) -> Mapping[str, str]:
            if not all(len(key) <= self.max_length and allowed.search(key) for key in value):
                raise refuse(self.message)
            return value

        pruned = core_schema.no_info_before_validator_function(prune_nulls, handler(source))
        return core_schema.no_info_after_validator_function(check, pruned)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rule = f"self.all(k, size(k) <= {self.max_length} && k.matches(r'{self.pattern}'))"
        return _with_rule(handler(core), rule, self.message)


@dataclass(frozen=True, slots=True)
class Between:
    """An integer in [minimum, maximum]. JSON has one number type: the API server takes 3.0, so the models do too.

    A number that a rule across fields reads is `exact`: the API server can't give 3.0 to CEL as an integer.
    """

    minimum: int
    maximum: int
    exact: bool = False

    @property
    def message(self) -> str:
        return f"must be an integer from {self.minimum} to {self.maximum}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> int:
            if isinstance(value, float) and value.is_integer() and not self.exact:
                value = int(value)
            if _is_int(value) and self.minimum <= value <= self.maximum:
                return int(value)
            raise refuse(self.message)

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        return _with_rule(schema, f"self >= {self.minimum}", self.message) if self.exact else schema


@dataclass(frozen=True, slots=True)
class BetweenOrAuto:
    """`auto` or an integer in [minimum, maximum]: `x-kubernetes-int-or-string` in the CRD."""

    minimum: int
    maximum: int

    @property
    def message(self) -> str:
        return f"must be auto or an integer from {self.minimum} to {self.maximum}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> int | str:
            if value == "auto":
                return "auto"
            if _is_int(value) and self.minimum <= value <= self.maximum:
                return int(value)
            raise refuse(self.message)

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rule = f"type(self) == int ? (self >= {self.minimum} && self <= {self.maximum}) : self == 'auto'"
        return _with_rule({"x-kubernetes-int-or-string": True}, rule, self.message)


@dataclass(frozen=True, slots=True)
class QuantityOrAuto:
    """`auto` or a Kubernetes quantity (2, 500m, 16Gi): `x-kubernetes-int-or-string` in the CRD, a string here."""

    PATTERN = r"^(auto|[0-9]{1,12}(\.[0-9]{1,9})?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?)$"
    MESSAGE = "must be auto or a Kubernetes quantity such as 500m, 4 or 16Gi"
    LIMIT = 10**12

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        allowed = _compile(self.PATTERN)

        def check(value: Any) -> str:
            if _is_int(value) and 0 <= value < self.LIMIT:
                return str(value)
            if isinstance(value, str) and allowed.search(value):
                return value
            raise refuse(self.MESSAGE)

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rule = f"type(self) == int ? (self >= 0 && self < {self.LIMIT}) : self.matches(r'{self.PATTERN}')"
        return _with_rule({"x-kubernetes-int-or-string": True, "maxLength": 64}, rule, self.MESSAGE)


@dataclass(frozen=True, slots=True)
class TargetModules:
    """`all-linear`, `default`, or a list of module names, as PEFT takes them.

    A structural schema has no union of string and array, so the CRD leaves the type open and refuses every other type
    by value validations (docs/adr/0003-unions-in-the-crd.md).
    """

    MESSAGE = "must be all-linear, default, or a list of module names such as [q_proj, v_proj]"
    NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"
    MAX_ITEMS = 64

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        allowed = _compile(self.NAME)

        def check(value: Any) -> str | tuple[str, ...]:
            if value in ("all-linear", "default"):
                return str(value)
            if (
                isinstance(value, list | tuple)
                and 1 <= len(value) <= self.MAX_ITEMS
                and all(isinstance(name, str) and allowed.search(name) for name in value)
            ):
                return tuple(value)
            raise refuse(self.MESSAGE)

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "x-kubernetes-preserve-unknown-fields": True,
            "pattern": "^(all-linear|default)$|$.^ or a list of module names: [q_proj, v_proj]",  # the user reads it
            "minItems": 1,
            "maxItems": self.MAX_ITEMS,
            "items": {"type": "string", "pattern": self.NAME},
            "not": {"enum": [True, False]},
            "minimum": 1,
            "maximum": 0,
            "minProperties": 1,
            "maxProperties": 0,
        }


@dataclass(frozen=True, slots=True)
class BoolOrAuto:
    """`auto`, `true` or `false`: an untyped enum in the CRD."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> bool | str:
            if isinstance(value, bool):
                return value
            if value == "auto":
                return "auto"
            raise refuse("must be auto, true or false")

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"x-kubernetes-preserve-unknown-fields": True, "enum": ["auto", True, False]}


Auto = Literal["auto"]

_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_PATH = r"[^\x00-\x20\x7f?#]+"
_HF = r"hf://([A-Za-z0-9][A-Za-z0-9_.-]*/)?[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9][A-Za-z0-9_./-]*)?"
_BUCKET = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_S3 = rf"{_BUCKET}(/{_PATH})?"
_PVC = rf"pvc://{_NAME}(/{_PATH})?"
_CONFIGMAP = rf"configmap://{_NAME}/[-._a-zA-Z0-9]+"
_FILE = rf"^file:///{_PATH}$"
_PLAIN_PATH = r"[A-Za-z0-9!&()*+,./:;=@_~-]+"


def _one_of(*uris: str) -> str:
    return f"^({'|'.join(uris)})$"


_NO_PARENT = Matches(r"/\.\.?(/|$)", "must not hold . or .. as a part of the path", never=True)
Uri = Annotated[str, Field(min_length=1, max_length=1024), _NO_PARENT]
ModelUri = Annotated[
    Uri,
    Matches(
        _one_of(_HF, _S3, _PVC),
        "must be hf://organisation/name[@revision], s3://bucket/path or pvc://claim/path; a space is %20",
        local_pattern=_FILE,
    ),
]
DatasetUri = Annotated[
    Uri,
    Matches(
        _one_of(_HF, _S3, _PVC, _CONFIGMAP),
        "must be hf://organisation/name[@revision], s3://bucket/path, pvc://claim/path or configmap://name/key; a "
        "space is %20",
        local_pattern=_FILE,
    ),
]
OutputUri = Annotated[
    str,
    Field(min_length=1, max_length=512),  # below it, the longest artifact's key must fit S3's 1,024 bytes
    _NO_PARENT,
    Matches(
        _one_of(rf"{_BUCKET}(/{_PLAIN_PATH})?"),
        "must be s3://bucket/prefix, in ASCII letters, digits and !&()*+,./:;=@_~-",
        local_pattern=_FILE,
    ),
]
Endpoint = Annotated[
    str,
    Field(min_length=1, max_length=512),
    Matches(
        r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?$",
        "must be http://host[:port] or https://host[:port], without credentials",
    ),
]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Matches(rf"^{_NAME}$", "must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.'"),
]
_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
LabelValue = Annotated[
    str,
    Field(min_length=1, max_length=63),
    Matches(
        rf"^{_LABEL}$", "must start and end with a letter or digit and hold only letters, digits, '-', '_' and '.'"
    ),
]
_LABEL_KEY = rf"^({_NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
_LABEL_KEY_MESSAGE = "must be a label key such as nvidia.com/gpu.product"
LabelKey = Annotated[str, Field(max_length=317), Matches(_LABEL_KEY, _LABEL_KEY_MESSAGE)]
LabelMap = Annotated[
    Mapping[
        str,
        Annotated[
            str,
            Field(max_length=63),
            Matches(rf"^({_LABEL})?$", "must be a label value: letters, digits, '-', '_', '.'"),
        ],
    ],
    Field(max_length=16),
    Keys(_LABEL_KEY, 317, f"each key {_LABEL_KEY_MESSAGE}"),
]
SecretKey = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Matches(r"^[-._a-zA-Z0-9]+$", "must be a key of a Secret: letters, digits, '-', '_' and '.'"),
]
Line = Annotated[
    str, Field(min_length=1, max_length=128), Matches(r"^[^\x00-\x1f\x7f]*$", "must not hold control characters")
]
"""A name within a dataset: a column, a split."""
Text = Annotated[
    str,
    Field(min_length=1, max_length=4096),
    Matches(r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$", "must not hold control characters other than tab and newline"),
]
"""Text of several lines: a prompt, a template."""
ColumnFilter = Annotated[
    Mapping[
        str, Annotated[str, Field(max_length=256), Matches(r"^[^\x00-\x1f\x7f]*$", "must not hold control characters")]
    ],
    Field(max_length=16),
    Keys(
        r"^[^\x00-\x1f\x7f]+$",
        128,
        "each key must be the name of a column: 1 to 128 characters, none a control character",
    ),
]
