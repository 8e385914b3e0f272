"""docs/reference/qlorajob.md: every field of the CRD in tables, one per object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

HEAD = """\
<!-- Generated from operator/qlorajob, do not edit: make generate -->

# QLoRAJob reference

`{api_version}`, kind `{kind}`, short name `{short}`. The same text is in the cluster: `kubectl explain {short}.spec`.
**Bold** fields are required; everything else has the default that the table shows, or none.
"""


def page(crd: Schema) -> str:
    """The page for a CustomResourceDefinition."""
    names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    head = HEAD.format(
        api_version=f"{crd['spec']['group']}/{version['name']}", kind=names["kind"], short=names["shortNames"][0]
    )
    sections = [*_sections("spec", root["properties"]["spec"]), *_sections("status", root["properties"]["status"])]
    return "\n".join([head, *sections])


def default_hint(field: Schema) -> str:
    """What is put after a field's description, since `kubectl explain` doesn't print defaults."""
    if field.get("default") in (None, [], {}) or "properties" in field:
        return ""
    return f" Default: {json.dumps(field['default']).strip(chr(34))}."


def _sections(path: str, schema: Schema) -> Iterator[str]:
    """The table of one object, then those of the objects in it."""
    required = schema.get("required", ())
    lines = [f"## {path}", "", schema.get("description", ""), ""]
    rules = [f"- {rule['message']}" for rule in schema.get("x-kubernetes-validations", ())]
    lines += ["| Field | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        shown = f"**{name}**" if name in required else name
        default = f"`{json.dumps(field['default'])}`" if "default" in field and "properties" not in field else ""
        cells = (shown, _type(field), default, field.get("description", "").removesuffix(default_hint(field)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if rules:
        lines += ["", "Rules:", "", *rules]
    yield "\n".join([*lines, ""])
    for name, field in schema["properties"].items():
        nested, suffix = (field["items"], "[]") if "items" in field else (field, "")
        if "properties" in nested:
            yield from _sections(f"{path}.{name}{suffix}", nested)


def _type(field: Schema) -> str:
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return str(field["x-kubernetes-validations"][0]["message"]).removeprefix("must be ")
    if field.get("x-kubernetes-preserve-unknown-fields"):
        return "string or list of strings"
    if "items" in field:
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    return str(field["type"]) + _bounds(field)


def _bounds(field: Schema) -> str:
    if "minimum" not in field:
        return ""
    low = f"> {field['minimum']}" if field.get("exclusiveMinimum") else f"≥ {field['minimum']}"
    if "maximum" not in field:
        return f" {low}"
    high = f"< {field['maximum']}" if field.get("exclusiveMaximum") else f"≤ {field['maximum']}"
    return f" {low}, {high}"
