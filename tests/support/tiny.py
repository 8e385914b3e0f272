"""A tiny random Llama with a real tokenizer: seconds to train, for tests whose point isn't what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 48


def write_model(directory: Path, tokenizer_from: Path, *, width: int = 64, **config: Any) -> None:
    """Two layers, SmolLM2's tokenizer; safetensors and config, changed by `config`, as the hub has them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def rows() -> list[dict[str, str]]:
    """Instruction rows with a column to filter on."""
    return [
        {
            "instruction": f"How many is {number} and one?",
            "output": f"It is {number + 1}.",
            "kind": "even" if number % 2 == 0 else "odd",
        }
        for number in range(ROWS)
    ]


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows()).encode()
