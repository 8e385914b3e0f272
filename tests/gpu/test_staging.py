"""Weights reach the GPU through page-locked memory as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.folders import save_model
from bench.models import Shape
from qlora_trainer import staging
from qlora_trainer.staging import Stage, staged_loading

SHAPE = Shape("llama", 512, 1024, 3, 4, 2, 2048)
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12_288, 50_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_tensor_of_any_size_arrives_to_the_bit(size: int, dtype: torch.dtype) -> None:
    stage = Stage(chunk_bytes=4096)
    tensors = [torch.randint(0, 255, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype) for _ in range(3)]
    arrived = [stage.copy(tensor, GPU) for tensor in tensors]
    for tensor, there in zip(tensors, arrived, strict=True):
        assert torch.equal(there.cpu().view(torch.uint8), tensor.view(torch.uint8))


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        str(folder),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )


def test_a_model_is_quantized_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(SHAPE, tmp_path / "model")
    usual = _load(folder).state_dict()
    staged: list[torch.Size] = []
    copy = Stage.copy

    def counted(self: Stage, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        staged.append(tensor.shape)
        return copy(self, tensor, device)

    monkeypatch.setattr(staging.Stage, "copy", counted)
    with staged_loading(on_gpu=True):
        loaded = _load(folder).state_dict()
    assert len(staged) > 20
    assert usual.keys() == loaded.keys()
    assert [name for name, tensor in usual.items() if not torch.equal(tensor, loaded[name])] == []
