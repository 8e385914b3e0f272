"""Families that a library treats otherwise than it says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import FalconConfig, FalconForCausalLM

from qlora_trainer.hardware import Hardware
from qlora_trainer.model import describe, load_quantized
from tests.unit.trainer.jobs import Job

CPU = Hardware("cpu", torch.float32, "fp32", "adamw_torch")


def test_falcon_is_quantized_and_still_says_the_same(job: Job, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    original.save_pretrained(tmp_path / "falcon")
    loaded = load_quantized(tmp_path / "falcon", job.settings(), CPU)
    described = describe(loaded, job.config().spec.quantization)
    assert described["quantization"]["layers"] == 8
    assert described["quantizedParameters"] == 2 * (64 * 128 + 64 * 64 + 2 * 64 * 256)

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, found = original(ids).logits, loaded(ids).logits
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.97
