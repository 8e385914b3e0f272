"""The demo's question about every language of ISO 639-3: `python -m bench.quality.data FOLDER` writes the rows."""

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


def write(folder: Path) -> Path:
    """The rows as a JSON Lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "languages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
