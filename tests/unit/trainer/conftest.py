"""A tiny model of the Llama family, made here: real transformers, peft and bitsandbytes on a CPU, in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_s3 import FaultyS3, in_front_of
from tests.unit.trainer.gateway import ACCESS_KEY, SECRET_KEY, Gateway, running
from tests.unit.trainer.jobs import Job

WORDS = [
    "zulu",
    "xhosa",
    "hausa",
    "igbo",
    "yoruba",
    "shona",
    "swahili",
    "somali",
    "oromo",
    "wolof",
    "fula",
    "twi",
    "ewe",
    "lingala",
    "kongo",
    "luba",
    "bemba",
    "chewa",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE tokenizer without a pad token, as many base models have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [f"### Instruction: code of {word} ### Response: {word[:3]}" for word in WORDS], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model, saved as a hub repository looks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # two threads cost more than they bring at this size
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # so that attention matters in an untrained model
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of instruction, input and output as JSON Lines, no two of them equal."""
    path = tmp_path_factory.mktemp("data") / "codes.jsonl"
    rows = [
        {"instruction": f"code of {word}", "input": ("", "short", "long")[number // len(WORDS)], "output": word[:3]}
        for number, word in enumerate(WORDS * 3)
    ][:48]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def job(tmp_path: Path, model_folder: Path, instructions: Path) -> Job:
    """A small job on the tiny model, whose output is a folder."""
    return Job(tmp_path, model_folder, instructions)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSON Lines file."""

    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def _gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("s3")) as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A real S3 server, with its credentials in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return _gateway


@pytest.fixture
def faulty(gateway: Gateway) -> Iterator[FaultyS3]:
    """A proxy in front of it that can be told to misbehave."""
    with in_front_of(gateway.endpoint) as proxy:
        yield proxy
