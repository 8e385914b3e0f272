"""Families that a library treats otherwise than it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, MptConfig, MptForCausalLM

from qlora_trainer.hardware import Hardware
from qlora_trainer.model import describe, load_quantized, require_isolated_documents
from qlora_vram.architectures import FAMILIES
from qlorajob.errors import Reason, StepError
from qlorajob.precision import NumberTypes
from tests.unit.trainer.jobs import Job

CPU = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")


def a_falcon(folder: Path) -> FalconForCausalLM:
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = FalconForCausalLM(config)
    model.save_pretrained(folder)
    return model


def test_falcon_is_quantized_and_still_says_the_same(job: Job, tmp_path: Path) -> None:
    original = a_falcon(tmp_path / "falcon")
    loaded = load_quantized(tmp_path / "falcon", job.settings(), CPU)
    described = describe(loaded, job.config().spec.quantization)
    assert described["quantization"]["layers"] == 8
    assert described["quantizedParameters"] == 2 * (64 * 128 + 64 * 64 + 2 * 64 * 256)

    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, found = original(ids).logits, loaded(ids).logits
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.97


def test_packed_rows_see_each_other_in_the_families_that_prepare_refuses_to_pack(tmp_path: Path) -> None:
    models = {
        "falcon": a_falcon(tmp_path / "falcon"),
        "mpt": MptForCausalLM(MptConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=2, max_seq_len=64)),
    }
    assert {name for name, family in FAMILIES.items() if not family.packs} == set(models)
    for model in models.values():
        with pytest.raises(StepError, match="packed rows would see each other"):
            require_isolated_documents(model)


def test_a_model_of_which_nothing_is_quantized_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Falcon was before, and the next model with a class of its own may be: it would train in 16 bit."""

    class OwnLinear(torch.nn.Linear):
        pass

    monkeypatch.setattr("transformers.models.falcon.modeling_falcon.FalconLinear", OwnLinear)
    monkeypatch.setattr("qlora_trainer.model.let_falcon_be_quantized", lambda: None)
    a_falcon(tmp_path / "falcon")
    with pytest.raises(StepError, match="hold this model in 4 bit") as refused:
        load_quantized(tmp_path / "falcon", job.settings(), CPU)
    assert (refused.value.reason, refused.value.field) == (Reason.UNSUPPORTED, "model.uri")
    assert refused.value.message.endswith("the model's weights are in OwnLinear")
