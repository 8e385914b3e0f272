"""A job with one field changed: for suggestions, and for questions of the kind "what if"."""

from __future__ import annotations

from typing import Any

from qlorajob.spec import QLoRAJobSpec


def with_field(spec: QLoRAJobSpec, path: str, value: Any) -> QLoRAJobSpec:
    """`spec` with the field at `path` (such as training.maxSequenceLength) set; rules are checked as for a manifest.

    Raises pydantic.ValidationError, or ValueError where `path` goes through something that has no fields.
    """
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    *parents, name = path.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ValueError(f"{path}: {parent} has no fields")
    place[name] = value
    return QLoRAJobSpec.model_validate(document, context={"local": True})
