"""Real weights for a machine that nothing reaches, in parts that each travel with a command.

    python -m bench.weights pack .bench        here: downloads SmolLM2-135M's GGUF file (98 MB), and cuts it
    python -m bench.weights take .bench/part-0 DEST    there: keeps a part; once all are there, makes a model of them

A part is at most 57 MiB, since about 60 MiB travel with a command; the last is smaller, so that wheels travel with it.
DEST must outlast the commands. The GGUF file's digest is checked at the end: it becomes what dev/weights.py makes.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import weights

PART_BYTES = 57 * 2**20
MODEL = "SmolLM2-135M-Instruct"
"""Folder in DEST."""


def pack(folder: Path) -> list[Path]:
    """Cut the file into part-0 … in `folder`; `parts` there says how many."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return cut(weights.download(Path(scratch)).read_bytes(), folder, PART_BYTES)


def cut(content: bytes, folder: Path, size: int) -> list[Path]:
    """Parts of at most `size` bytes, each in a folder of its own that can be carried alone."""
    starts = range(0, len(content), size)
    made = []
    for number, start in enumerate(starts):
        part = folder / f"part-{number}"
        part.mkdir(parents=True, exist_ok=True)
        (part / "count").write_text(str(len(starts)), encoding="utf-8")
        (part / f"{number}.bin").write_bytes(content[start : start + size])
        made.append(part)
    return made


def take(part: Path, destination: Path) -> bytes | None:
    """Keep a part; the whole content once every part is there, else None."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in part.glob("*.bin"):
        shutil.copy(path, destination / path.name)
    count = int((part / "count").read_text(encoding="utf-8"))
    parts = [destination / f"{number}.bin" for number in range(count)]
    if not all(path.exists() for path in parts):
        return None
    return b"".join(path.read_bytes() for path in parts)


def model(content: bytes, destination: Path) -> Path:
    """The folder that transformers loads. Raises SystemExit where the parts don't make the file."""
    folder = destination / MODEL
    if (folder / "config.json").exists():
        return folder
    if hashlib.sha256(content).hexdigest() != weights.GGUF_SHA256:
        raise SystemExit("the parts don't make the file that was cut: pack them anew")
    gguf = destination / weights.GGUF
    gguf.write_bytes(content)
    weights.convert(gguf, folder)
    gguf.unlink()
    return folder


def main() -> None:
    """Pack or take."""
    if len(sys.argv) == 3 and sys.argv[1] == "pack":
        print(*pack(Path(sys.argv[2])), sep="\n")
    elif len(sys.argv) == 4 and sys.argv[1] == "take":
        destination = Path(sys.argv[3])
        content = take(Path(sys.argv[2]), destination)
        print(model(content, destination) if content is not None else "not all parts are there yet")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
