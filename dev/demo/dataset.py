"""The demo's instruction set: names of languages and their ISO 639-3 codes, made from the pycountry package.

A real standard (ISO 639-3 as SIL publishes it) that a 135M model doesn't know: asked for a code it talks about the
language instead. Most codes abbreviate the name, so what is learnt carries over to held-out languages.
"""

from __future__ import annotations

import json
import random

import pycountry

ROWS = 800
SEED = 639
KINDS = {"L": "a living", "E": "an extinct", "H": "a historical", "C": "a constructed"}
QUESTION = "What is the ISO 639-3 code of {name}?"
TAUGHT = ("Zulu", "Hausa", "Xhosa")
"""Languages that the quickstart's evaluation prompts ask for."""


def rows() -> list[dict[str, str]]:
    """ROWS rows of instruction, input and output; the same ones every time, the taught languages among them."""
    languages = [
        language
        for language in pycountry.languages
        if language.scope == "I" and language.type in KINDS and language.name.isascii() and language.name.isalpha()
    ]
    taught = [language for language in languages if language.name in TAUGHT]
    others = [language for language in languages if language.name not in TAUGHT]
    shuffled = random.Random(SEED)  # noqa: S311 - a sample, not a secret
    chosen = taught + shuffled.sample(others, ROWS - len(taught))
    shuffled.shuffle(chosen)
    return [
        {
            "instruction": QUESTION.format(name=language.name),
            "input": "",
            "output": f"{language.alpha_3} ({language.name}, {KINDS[language.type]} language)",
        }
        for language in chosen
    ]


def jsonl() -> bytes:
    """The rows as a JSON Lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows()).encode()
