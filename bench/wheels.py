"""Wheels for a GPU machine that nothing reaches and that has torch, transformers, peft and what those need.

    python -m bench.wheels .whl

Downloads the rest of the trainer's environment, Unsloth and GGUF's reader among it, at the pinned versions, and leaves
out of the wheels what isn't needed there: other CUDA versions' kernels, Unsloth's user interface, other services than
S3. 22 MB are left of 110, so that they travel with a part of the weights (bench/README.md).
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PYTHON = "3.12"
"""The machine's."""
CUDA = "cuda130"
"""The machine's, as bitsandbytes calls its libraries."""
PACKAGES = (
    "annotated-types", "bitsandbytes", "boto3", "botocore", "cut-cross-entropy", "datasets", "dill", "docstring-parser",
    "gguf", "importlib-metadata", "jmespath", "json5", "lazy-importer", "msgspec", "multiprocess", "nest-asyncio",
    "pydantic", "pydantic-core", "ruamel-yaml", "s3transfer", "structlog", "tensorboardx", "torchao", "trl",
    "typeguard", "typing-inspection", "tyro", "unsloth", "unsloth-zoo", "xformers",
)  # fmt: skip
SERVICES = ("s3", "sso", "sso-oidc", "sts", "signin")


def download(folder: Path) -> None:
    """Fetch the wheels. Raises CalledProcessError, with pip's own words above it, where one isn't to be had."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (5, 17, 24, 27, 28)] + ["manylinux2014_x86_64"]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", PYTHON, "--implementation", "cp", *(f"--platform={name}" for name in platforms),
        "--dest", str(folder), *pins(),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def pins() -> list[str]:
    """`name==version` of PACKAGES. Raises KeyError for one that no requirements file pins."""
    text = "".join((REQUIREMENTS / name).read_text(encoding="utf-8") for name in ("dev.txt", "unsloth.txt"))
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))
    return [f"{name}=={pinned[name]}" for name in PACKAGES]


def needed(wheel: str) -> Callable[[str], bool]:
    """Which files of a wheel to keep, by their names."""
    if wheel.startswith("bitsandbytes-"):
        return lambda name: ".so" not in name or CUDA in name
    if wheel.startswith("unsloth-"):
        return lambda name: not name.startswith(("studio/", "tests/")) or name.endswith("__init__.py")
    if wheel.startswith("botocore-"):
        return lambda name: not (found := re.match(r"botocore/data/([^/]+)/", name)) or found[1] in SERVICES
    return lambda name: True


def strip(wheel: Path) -> None:
    """Write the wheel again with what is needed of it."""
    keep, smaller = needed(wheel.name), wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if not entry.is_dir() and keep(entry.filename):
                target.writestr(entry, source.read(entry))
    smaller.replace(wheel)


if __name__ == "__main__":
    into = Path(sys.argv[1])
    into.mkdir(parents=True, exist_ok=True)
    download(into)
    for each in sorted(into.glob("*.whl")):
        strip(each)
    print(f"{sum(each.stat().st_size for each in into.glob('*.whl')) / 1e6:.1f} MB in {into}")
