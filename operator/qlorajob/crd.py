"""The CustomResourceDefinition and its reference page, generated from the models: `python -m qlorajob.crd [--check]`.

Pydantic writes JSON schema; the API server takes the *structural* part of it: no references, no unions with null,
exclusive bounds as booleans, a default at every level. This module is the translation.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import io
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from qlorajob.base import ContractModel, models_in, prune_nulls
from qlorajob.names import GROUP, KIND, PLURAL, VERSION
from qlorajob.reference import default_hint, page
from qlorajob.resource import NAME_MAX_LENGTH
from qlorajob.spec import QLoRAJobSpec
from qlorajob.status import QLoRAJobStatus

Schema = dict[str, Any]

COLUMNS = (
    ("Model", ".spec.model.uri"),
    ("Phase", ".status.phase"),
    ("Step", ".status.display.step"),
    ("Loss", ".status.display.loss"),
    ("Tok/s", ".status.display.tokensPerSecond"),
    ("ETA", ".status.display.eta"),
    ("GPU", ".status.display.gpu"),
)
"""What `kubectl get qlj` prints, between NAME and AGE."""

KEYWORDS = (
    "description",
    "type",
    "enum",
    "default",
    "format",
    "pattern",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "not",
    "required",
    "properties",
    "items",
    "additionalProperties",
)
"""What a structural schema may say, in the order in which it is written; `x-kubernetes-*` comes last."""


def crd() -> Schema:
    """The CustomResourceDefinition, as an apiextensions.k8s.io/v1 object."""
    columns: list[Schema] = [{"name": name, "type": "string", "jsonPath": path} for name, path in COLUMNS]
    columns.append({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["qlj"],
                "categories": ["all", "ai"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _root() -> Schema:
    status = structural(QLoRAJobStatus, defaults=False)  # it is what the operator wrote, no more
    status["default"] = {"observedGeneration": -1}  # kstatus reads an unseen job as InProgress, not as done
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return {
        "description": inspect.getdoc(QLoRAJobSpec),
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{KIND}."},
            "metadata": {"type": "object"},
            "spec": structural(QLoRAJobSpec),
            "status": status,
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {NAME_MAX_LENGTH}",
                "message": f"metadata.name must have at most {NAME_MAX_LENGTH} characters: it becomes a label's value",
            }
        ],
    }


def structural(model: type[ContractModel], *, defaults: bool = True) -> Schema:
    """The structural schema of a model, with the docstrings of the classes and fields as descriptions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    for described in _models(model):
        _describe(described, definitions.get(described.__name__, schema))
    return _structural(schema, definitions, defaults)


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and every model below it."""
    yield model
    for field in model.model_fields.values():
        for nested in models_in(field.annotation):
            yield from _models(nested)


def _describe(model: type[BaseModel], schema: Schema) -> None:
    """Put the docstring below each field of the class into its schema."""
    docstrings = _docstrings(model.__module__)[model.__name__]
    for name, field in model.model_fields.items():
        if name in docstrings:
            schema["properties"][field.alias or name]["description"] = docstrings[name]


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """The docstring below each annotated name, by class."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            target: inspect.cleandoc(text)
            for statements in pairwise(node.body)
            for target, text in _docstring(*statements)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _docstring(statement: ast.stmt, following: ast.stmt) -> Iterator[tuple[str, str]]:
    match statement, following:
        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
            yield name, text


def _structural(node: Schema, definitions: Schema, defaults: bool) -> Schema:
    """Translate one node, and those below it."""
    node = _resolved(node, definitions)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            node |= {bound: node[exclusive], exclusive: True}
    if not defaults or node.get("default", ...) is None:
        node.pop("default", None)
    elif "properties" in node and "default" in node:  # in full: the API server checks it before it fills it
        node["default"] = prune_nulls(node["default"])
    if "description" in node:
        node["description"] += default_hint(node)
    for below in node.keys() & {"items", "additionalProperties"}:
        if isinstance(node[below], bool):
            del node[below]
        else:
            node[below] = _structural(node[below], definitions, defaults)
    if "properties" in node:
        node["properties"] = {
            name: _structural(field, definitions, defaults) for name, field in node["properties"].items()
        }
    return {keyword: node[keyword] for keyword in KEYWORDS if keyword in node} | {
        keyword: value for keyword, value in node.items() if keyword.startswith("x-kubernetes-")
    }


def _resolved(node: Schema, definitions: Schema) -> Schema:
    """The node without $ref and without the union with null; what stands beside them (description, default) wins."""
    node = dict(node)
    while {"$ref", "anyOf"} & node.keys():
        if reference := node.pop("$ref", None):
            node = definitions[reference.rsplit("/", 1)[1]] | node
        else:
            (present,) = (choice for choice in node.pop("anyOf") if choice != {"type": "null"})
            node = present | node
    return node


def to_yaml(obj: Schema) -> str:
    """Deterministic block YAML under the header of every generated file."""
    yaml = YAML(typ="rt")
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.ignore_aliases = lambda _: True
    out = io.StringIO("# Generated from operator/qlorajob, do not edit: make generate\n")
    out.seek(0, io.SEEK_END)
    yaml.dump(obj, out)
    return out.getvalue()


def generated() -> dict[str, str]:
    """Every generated file of the contract: its path in the repository, and its content."""
    definition = to_yaml(crd())
    return {
        f"crds/{PLURAL}.{GROUP}.yaml": definition,
        f"charts/qlora-operator/crds/{PLURAL}.yaml": definition,
        "docs/reference/qlorajob.md": page(crd()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the generated files, or check them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlorajob.crd", description="Write the generated files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with a diff when a file is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the repository")
    options = parser.parse_args(arguments)
    stale = 0
    for name, content in generated().items():
        path: Path = options.root / name
        current = path.read_text() if path.exists() else ""
        if current == content:
            continue
        stale += 1
        if options.check:
            diff = difflib.unified_diff(current.splitlines(True), content.splitlines(True), name, f"{name} (generated)")
            sys.stdout.writelines(diff)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            print(f"wrote {name}")
    if options.check and stale:
        print(f"{stale} generated files are stale: make generate", file=sys.stderr)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
