"""Every manifest under examples/ is valid as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from qlorajob.resource import parse

EXAMPLES = Path(__file__).parents[3] / "examples"
MANIFESTS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_an_example_is_accepted(path: Path) -> None:
    (manifest,) = YAML(typ="safe", pure=True).load_all(path)
    assert parse(manifest).metadata.name


def test_examples_have_names_of_their_own_and_outputs_of_their_own() -> None:
    jobs = [parse(YAML(typ="safe", pure=True).load(path)) for path in MANIFESTS]
    assert len({job.metadata.name for job in jobs}) == len({job.spec.output.uri for job in jobs}) == len(jobs)


def test_the_list_of_examples_is_complete() -> None:
    listed = re.findall(r"\]\(([a-z0-9-]+\.yaml)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == [path.name for path in MANIFESTS]
