"""A tiny model of each family from its manifest to the answer of its merged model, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter, load_quantized
from qlorajob.errors import Reason, StepError
from qlorajob.precision import NumberTypes
from qlorajob.spec import LoraSpec
from qlorajob.status import Prepared
from tests.support.families import FAMILIES, Family, write_model
from tests.unit.trainer.jobs import Job

RANK = 4
CPU = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
ROUNDING = 0.01
"""What rounding each weight to bfloat16 (0.2 % on average) does to the logits of a model of two layers, at most."""
EOS = "</s>"


@dataclass(frozen=True)
class Trained:
    """A family's model after the whole path."""

    family: Family
    model: Path
    job: Job
    prepared: Prepared

    @property
    def folder(self) -> Path:
        return self.job.output / self.prepared.run_id

    @property
    def report(self) -> dict[str, Any]:
        return self.job.result(self.prepared, "report.json")  # type: ignore[no-any-return]

    def load(self, folder: Path, **options: Any) -> Any:
        """A model as a user would load it."""
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=self.family.own_code, **options).eval()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.model_type)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, instructions: Path
) -> Iterator[Trained]:
    """Prepared, trained and merged, each by the trainer's own command."""
    family: Family = request.param
    published = deepcopy(tokenizer)
    if family.pad_token:
        published.add_special_tokens({"pad_token": family.pad_token})
    published.padding_side = family.padding_side
    folder = tmp_path_factory.mktemp(family.model_type)
    model = write_model(family, published, folder / "model")

    job = Job(folder, model, instructions)
    job.change(
        model={"trustRemoteCode": family.own_code},
        training={"maxSteps": 4, "learningRate": 2e-2, "packing": family.packs},
        lora={"rank": RANK, "targetModules": "all-linear"},
        evaluation={"prompts": ["code of zulu ="], "maxNewTokens": 4},
        merge={"enabled": True},
    )
    job.remote_code_allowed = family.own_code
    prepared = job.prepare()
    job.train(prepared, checkpointing="full")
    job.run("merge", job.config(prepared))
    return Trained(family, model, job, prepared)


def test_every_linear_layer_is_in_4_bit_and_has_an_adapter_and_nothing_else_is_trained(trained: Trained) -> None:
    base = trained.load(trained.model)
    linears = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in trained.family.linears
    }
    found = trained.report["model"]
    assert len(linears) == 2 * len(trained.family.linears)
    assert found["modules"]["Linear4bit"] == found["quantization"]["layers"] == len(linears)
    assert found["quantizedParameters"] == sum(module.weight.numel() for module in linears.values())
    assert found["trainableParameters"] == RANK * sum(m.in_features + m.out_features for m in linears.values())


def test_it_learns(trained: Trained) -> None:
    assert trained.report["loss"]["evalTuned"] < trained.report["loss"]["evalBase"]


def test_padding_is_on_the_right_with_the_model_s_own_token_or_the_end_of_text(trained: Trained) -> None:
    for folder in ("adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(trained.folder / folder)
        assert (tokenizer.pad_token, tokenizer.padding_side) == (trained.family.pad_token or EOS, "right")


def test_merged_logits_are_those_of_the_adapter_on_the_16_bit_base(trained: Trained) -> None:
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        merged = trained.load(trained.folder / "merged", dtype=torch.float32)(ids, use_cache=False).logits
        base = trained.load(trained.model, dtype=torch.float32)
        untuned = base(ids, use_cache=False).logits
        tuned = PeftModel.from_pretrained(base, str(trained.folder / "adapter")).eval()
        expected = tuned(input_ids=ids, use_cache=False).logits
    assert _distance(merged, expected) < ROUNDING
    assert _distance(untuned, expected) > 5 * ROUNDING


def test_the_merged_model_generates_what_the_report_says(trained: Trained) -> None:
    model = trained.load(trained.folder / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "merged")
    (entry,) = trained.report["prompts"]
    asked = tokenizer(entry["text"], return_tensors="pt")["input_ids"]
    said = model.generate(input_ids=asked, max_new_tokens=4, do_sample=False)[0, asked.shape[1] :]
    assert len(said) > 0
    assert tokenizer.decode(said, skip_special_tokens=True) == entry["merged"]


@pytest.mark.parametrize("targets", ["default", "listed"])
def test_the_adapter_is_on_the_family_s_default_layers_or_on_those_that_are_listed(
    trained: Trained, targets: str
) -> None:
    family = trained.family
    wanted = family.default if targets == "default" else frozenset(family.listed)
    spec = LoraSpec.model_validate({"targetModules": "default" if targets == "default" else list(family.listed)})
    model = load_quantized(trained.model, trained.job.settings(), CPU)
    if wanted is None:
        with pytest.raises(StepError, match="PEFT refuses") as refused:
            add_adapter(model, spec)
        assert refused.value.reason is Reason.TARGET_MODULES_NOT_FOUND
        return
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in add_adapter(model, spec).named_modules()
        if isinstance(getattr(module, "base_layer", None), Linear4bit)
    }
    assert len(adapted) == 2 * len(wanted)
    assert all(any(name.endswith(f".{layer}") for layer in wanted) for name in adapted)


def test_a_family_packs_only_where_packed_rows_stay_apart(trained: Trained, instructions: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, trained.model, instructions)
    job.change(model={"trustRemoteCode": trained.family.own_code}, training={"packing": True, "maxSteps": 1})
    job.remote_code_allowed = trained.family.own_code
    if trained.family.packs:
        assert trained.report["data"]["packed"]
        return
    with pytest.raises(StepError) as refused:
        job.train()
    assert refused.value.field == "training.packing"


def test_code_of_its_own_runs_only_where_manifest_and_operator_both_trust_it(
    trained: Trained, instructions: Path, tmp_path: Path
) -> None:
    if not trained.family.own_code:
        assert not list(trained.folder.rglob("*.py"))
        return
    assert {path.name for path in (trained.folder / "merged").glob("*.py")} == {
        "configuration_chatglm.py",
        "modeling_chatglm.py",
    }
    for manifest, operator in ((False, True), (True, False)):
        job = Job(tmp_path, trained.model, instructions)
        job.change(model={"trustRemoteCode": manifest}, training={"packing": False})
        job.remote_code_allowed = operator
        with pytest.raises(StepError) as refused:
            job.prepare()
        assert refused.value.reason is Reason.REMOTE_CODE_REFUSED


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative error."""
    return float((one - other).norm() / other.norm())
