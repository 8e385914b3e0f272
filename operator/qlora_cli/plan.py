"""`qlora plan`: how a manifest would be trained, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from qlora_cli.manifests import parse_document, read_document
from qlora_cli.questions import Answer, answer, change, facts_of
from qlorajob.plan import Plan


def show_plan(manifest: Path, *, gpu: str | None, questions: Sequence[str], config: Path | None, as_json: bool) -> bool:
    """Print the plan; whether there is one.

    Raises:
        ManifestError: the manifest or a question is wrong, or nothing is known of the model.
    """
    document = read_document(manifest)
    for question in (*questions, *([f"resources.gpuClass={gpu}"] if gpu else ())):
        change(document, question)
    spec = parse_document(document, manifest).spec
    found = answer(spec, facts_of(spec, config))
    if as_json:
        click.echo(json.dumps(found.to_wire(), indent=2))
    else:
        _show(found)
    return isinstance(found.outcome, Plan)


def _show(found: Answer) -> None:
    from rich.console import Console

    from qlora_cli.plan_table import show

    show(found, Console())
