"""The demo's instruction set: names of languages and their ISO 639-3 codes, made from the pycountry package.

A real standard (ISO 639-3 as SIL publishes it, for the languages that ISO 639-1 has a code for too) that a 135M model
doesn't know: asked for a code it makes up digits. Most codes abbreviate the name, so what is learnt carries over to
held-out rows.
"""

from __future__ import annotations

import json

import pycountry

KINDS = {"L": "a living", "E": "an extinct", "H": "a historical", "C": "a constructed"}
QUESTION = "What is the ISO 639-3 code of {name}?"
TAUGHT = ("Zulu", "Hausa", "Xhosa")
"""Languages that the quickstart's evaluation prompts ask for."""


def rows() -> list[dict[str, str]]:
    """One row for each language, with instruction and output."""
    return [
        {
            "instruction": QUESTION.format(name=language.name),
            "output": f"{language.alpha_3} ({language.name}, {KINDS[language.type]} language)",
        }
        for language in pycountry.languages
        if hasattr(language, "alpha_2") and language.type in KINDS
    ]


def jsonl() -> bytes:
    """The rows as a JSON Lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows()).encode()
