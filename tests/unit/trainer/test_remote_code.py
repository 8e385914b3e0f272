"""A model whose own code was written for transformers 4 takes the whole path, as ChatGLM2 of recipe R4 has to."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.hardware import Hardware
from qlora_trainer.model import load_16bit, load_quantized
from qlora_trainer.tokenizer import load_tokenizer
from qlorajob.errors import Reason, StepError
from qlorajob.precision import NumberTypes
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

CODE = Path(__file__).parents[2] / "support" / "old_code"
WORDS, WIDTH, LAYERS, RANK = 259, 64, 2, 4
PROMPTS = ["code of zulu =", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As its repository looks on the hub."""
    folder = tmp_path_factory.mktemp("old") / "model"
    folder.mkdir()
    for code in CODE.glob("*_old.py"):
        shutil.copy(code, folder)
    config = {
        "model_type": "old",
        "auto_map": {
            "AutoConfig": "configuration_old.OldConfig",
            "AutoModelForCausalLM": "modeling_old.OldForCausalLM",
        },
        "eos_token_id": 256,
        "torch_dtype": "float16",
    }
    tokenizer = {
        "tokenizer_class": "OldTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_old.OldTokenizer", None]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(0)
    weights = {f"transformer.{name}.weight": torch.randn(WORDS, WIDTH) for name in ("embedding", "output_layer")}
    for number in range(LAYERS):
        weights |= {
            f"transformer.layers.{number}.weight": torch.randn(WIDTH, WIDTH) / 4,
            f"transformer.layers.{number}.bias": torch.randn(WIDTH) / 4,
        }
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Done:
    """The whole path."""

    job: Job
    prepared: Prepared

    @property
    def folder(self) -> Path:
        return self.job.output / self.prepared.run_id

    @property
    def report(self) -> dict[str, Any]:
        return self.job.result(self.prepared, "report.json")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path, instructions: Path) -> Done:
    job = Job(tmp_path_factory.mktemp("done"), model, instructions)
    job.change(
        model={"trustRemoteCode": True},
        training={"packing": False},
        evaluation={"prompts": PROMPTS, "maxNewTokens": 4},
        merge={"enabled": True, "dtype": "float32"},
    )
    job.remote_code_allowed = True
    prepared = job.prepare()
    job.train(prepared)
    job.run("merge", job.config(prepared))
    return Done(job, prepared)


def test_it_learns(done: Done) -> None:
    assert done.report["loss"]["evalTuned"] < done.report["loss"]["evalBase"]


def test_the_output_head_stays_as_it_is(done: Done) -> None:
    adapter = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in adapter} == {"layers"}
    assert done.report["model"]["modules"]["Linear4bit"] == LAYERS


def test_weights_that_were_not_trained_come_out_of_the_merge_as_they_went_in(done: Done, model: Path) -> None:
    base, merged = load_file(model / "model.safetensors"), load_file(done.folder / "merged" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name].float(), merged[name])}
    assert changed == {f"transformer.layers.{number}.weight" for number in range(LAYERS)}


def test_a_buffer_that_is_in_no_file_holds_what_the_code_puts_there(done: Done, model: Path) -> None:
    hardware, expected = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch"), torch.linspace(0.5, 1, WIDTH)
    torch.full((1 << 20,), torch.nan)  # memory that is free again, and may be taken next
    for loaded in (
        load_quantized(model, done.job.settings(), hardware),
        load_16bit(model, done.job.settings(), torch.float32),
    ):
        torch.testing.assert_close(loaded.transformer.scale, expected)


def test_a_prompt_s_answer_does_not_depend_on_those_beside_it(done: Done) -> None:
    """Greedy, from logits of the code's own; prompts of different lengths are asked together."""
    merged, settings = done.folder / "merged", done.job.settings()
    model, tokenizer = load_16bit(merged, settings, torch.float32).eval(), load_tokenizer(merged, settings)
    for entry in done.report["prompts"]:
        ids = torch.tensor([tokenizer(entry["text"])["input_ids"]])
        asked = ids.shape[1]
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(ids[0, asked:], skip_special_tokens=True) == entry["merged"]


def test_a_tokenizer_that_fails_in_its_own_code_is_named(model: Path, instructions: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    code = broken / "tokenization_old.py"
    code.write_text(code.read_text().replace("return 259", "raise RuntimeError('no vocabulary')"))
    job = Job(tmp_path, broken, instructions).change(model={"trustRemoteCode": True}, training={"packing": False})
    job.remote_code_allowed = True
    with pytest.raises(StepError, match="has no usable tokenizer: no vocabulary") as refused:
        job.prepare()
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")
