"""The demo's dataset: real, the same every time, and with the rows that the quickstart asks about."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from demo import dataset

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart.yaml"


def test_the_rows_are_the_same_every_time() -> None:
    assert dataset.jsonl() == dataset.jsonl()


def test_no_language_is_asked_for_twice() -> None:
    questions = [row["instruction"] for row in dataset.rows()]
    assert len(set(questions)) == len(questions) > 150


def test_the_quickstarts_prompts_are_among_the_taught_rows() -> None:
    prompts = YAML(typ="safe", pure=True).load(QUICKSTART)["spec"]["evaluation"]["prompts"]
    answers = {row["instruction"]: row["output"] for row in dataset.rows()}
    assert [answers[prompt].split()[0] for prompt in prompts] == ["zul", "hau", "xho"]
