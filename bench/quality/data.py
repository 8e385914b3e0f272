"""Instruction sets as JSON Lines: `python -m bench.quality.data FOLDER [NAME=FILE]...`

languages.jsonl is the demo's question about every language of ISO 639-3. NAME.jsonl are the rows of a FILE in Alpaca's
form, a JSON list of instruction, input and output, such as gsm8k=gsm_8k_train.json (bench/README.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def rows() -> list[dict[str, str]]:
    """One row for each language: nearly 8,000, where the demo has the 180 best known."""
    import pycountry

    from demo.dataset import KINDS, QUESTION

    return [
        {
            "instruction": QUESTION.format(name=language.name),
            "output": f"{language.alpha_3} ({language.name}, {KINDS[language.type]} language)",
        }
        for language in pycountry.languages
        if language.type in KINDS
    ]


def from_alpaca(path: Path) -> list[dict[str, str]]:
    """Rows of a file in Alpaca's form; an input follows its instruction in a line of its own."""
    return [
        {"instruction": "\n".join(filter(None, (row["instruction"], row.get("input")))), "output": row["output"]}
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def write(folder: Path, name: str = "languages", made: list[dict[str, str]] | None = None) -> Path:
    """The rows as a JSON Lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made or rows()), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
    for name, _, source in (argument.partition("=") for argument in sys.argv[2:]):
        print(write(Path(sys.argv[1]), name, from_alpaca(Path(source))))
