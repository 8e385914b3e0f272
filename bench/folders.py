"""Models and data of random numbers on disk, as a hub repository has them: for what begins with reading files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.models import Shape

WORDS = 1000
"""That the tokenizer knows: each is a token."""


def save_model(shape: Shape, folder: Path, *, max_length: int = 8192) -> Path:
    """A model of the shape in bfloat16, with a tokenizer; what is there already stays."""
    if (folder / "config.json").exists():
        return folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(max_length), dtype=torch.bfloat16)
    tokenizer().save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def tokenizer() -> Any:
    """Of WORDS words, which spaces keep apart. It has no token for padding."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=1 << 20
    )


def save_rows(path: Path, rows: int, length: int) -> Path:
    """Rows of `length` tokens. Common words are far more common than rare ones, so that there is something to learn."""
    draw = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            words = 3 + draw.zipf(1.5, 2 * length) % (WORDS - 3)
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in words[: length - 1])}) + "\n")
    return path
