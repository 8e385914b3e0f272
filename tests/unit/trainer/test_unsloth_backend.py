"""What training.backend: unsloth refuses, and what it hands to Unsloth. Unsloth itself: test_unsloth.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora_trainer.hardware import Hardware
from qlora_trainer.tokenizer import load_tokenizer
from qlora_trainer.unsloth_backend import _checkpointing, _targets, _tokenizer_for_unsloth, load
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.precision import NumberTypes
from qlorajob.status import Prepared
from tests.unit.trainer.jobs import Job

REQUIREMENTS = Path(__file__).parents[3] / "requirements"


@pytest.fixture
def unsloth_job(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job that asks for Unsloth, in an image that has a package of that name."""
    package = tmp_path / "packages" / "unsloth"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('prepare has no time for that')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return job.change(training={"backend": "unsloth"})


def test_prepare_finds_out_the_same_without_importing_unsloth(unsloth_job: Job) -> None:
    prepared = unsloth_job.prepare()
    expected = unsloth_job.change(training={"backend": "hf"}).prepare()
    assert _without_names(prepared) == _without_names(expected)
    assert prepared.run_id != expected.run_id


def _without_names(prepared: Prepared) -> dict[str, Any]:
    return prepared.model_dump(exclude={"key", "run_id"})


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        pytest.param({"quantization": {"type": "fp4"}}, "quantization.type", "set nf4", id="fp4"),
        pytest.param({"quantization": {"doubleQuant": False}}, "quantization.doubleQuant", "set true", id="once"),
        pytest.param({"training": {"precision": "fp32"}}, "training.precision", "one 16-bit type", id="fp32"),
        pytest.param(
            {"training": {"precision": "fp16"}, "quantization": {"computeDtype": "bfloat16"}},
            "training.precision", "one 16-bit type", id="two types",
        ),
        pytest.param({"lora": {"bias": "all"}}, "lora.bias", "set none", id="biases"),
        pytest.param({"model": {"trustRemoteCode": True}}, "model.trustRemoteCode", "set false", id="remote code"),
        pytest.param(
            {"training": {"maxSequenceLength": 257}}, "training.maxSequenceLength", "set at most 256", id="length",
        ),
        pytest.param({"resources": {"gpuClass": None, "gpus": 2}}, "resources.gpus", "several GPUs", id="gpus"),
    ],
)  # fmt: skip
def test_what_unsloth_cannot_do_is_refused_with_the_field_and_what_to_do(
    unsloth_job: Job, changes: dict[str, Any], field: str, words: str
) -> None:
    refusal = _refusal(unsloth_job.change(**changes))
    assert (refusal.reason, refusal.field) == (Reason.UNSUPPORTED, field)
    assert refusal.message.startswith(f"{field}: ")
    assert words in refusal.message


def test_a_family_that_unsloth_has_no_layers_for_is_refused(
    unsloth_job: Job, model_folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "gemma"
    shutil.copytree(model_folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    refusal = _refusal(unsloth_job.change(model={"uri": f"file://{changed}"}))
    assert (refusal.reason, refusal.field) == (Reason.UNSUPPORTED, "training.backend")
    assert "gemma, only for llama, mistral" in refusal.message


def _refusal(job: Job) -> StepError:
    with pytest.raises(StepError) as refused:
        job.prepare()
    return refused.value


class Asked(Exception):  # noqa: N818 - it says what happened
    """Unsloth was asked for the model."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for Unsloth, where there is none: it only tells that it was asked."""

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise Asked

    module = ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "lacks weights: there is no model.layers.2."),
        ({"intermediate_size": 96}, "model.layers.0.mlp.down_proj.weight is 64×128, and should be 64×96"),
    ],
)
def test_unsloth_is_not_asked_for_weights_that_are_not_those_of_the_config(
    job: Job, model_folder: Path, changes: dict[str, Any], words: str
) -> None:
    folder = job.folder / "changed"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(StepError) as refused:
        _load(job, folder)
    assert words in refused.value.message
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")
    assert refused.value.code is ExitCode.INVALID


@pytest.mark.usefixtures("stand_in")
def test_unsloth_is_asked_for_weights_that_are(job: Job, model_folder: Path) -> None:
    with pytest.raises(Asked):
        _load(job, model_folder)


def _load(job: Job, folder: Path) -> Any:
    settings, plan = job.settings(), job.config().plan
    assert plan is not None
    hardware = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")
    return load(folder, load_tokenizer(folder, settings), settings, plan, hardware)


def test_unsloth_s_tokenizer_pads_with_what_ends_the_model_s_texts(job: Job, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    settings = job.settings()
    tokenizer = load_tokenizer(model_folder, settings)
    given = AutoTokenizer.from_pretrained(_tokenizer_for_unsloth(tokenizer, model_folder, settings))
    config = json.loads((model_folder / "config.json").read_text())
    assert given.pad_token_id == config["eos_token_id"] != given.eos_token_id
    assert len(given) == len(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == config["eos_token_id"]  # ours stays as it was


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"checkpointing": "none"}, False),
        ({"checkpointing": "partial", "checkpointed_layers": 1}, True),
        ({"checkpointing": "full"}, True),
        ({"checkpointing": "full", "offload_checkpoints": True}, "unsloth"),
    ],
)
def test_checkpointing_is_the_plan_s_or_of_more_layers(job: Job, cut: dict[str, Any], expected: bool | str) -> None:
    plan = job.config().plan
    assert plan is not None
    assert _checkpointing(plan.model_copy(update=cut)) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", "all-linear"),
        ("default", ["q_proj", "v_proj"]),
        (["up_proj", "k_proj"], ["up_proj", "k_proj"]),
    ],
)
def test_the_adapter_s_layers_are_those_of_the_manifest(job: Job, wanted: Any, expected: Any) -> None:
    assert _targets(job.change(lora={"targetModules": wanted}).config().spec.lora, "llama") == expected


def test_the_image_with_unsloth_holds_all_that_the_other_holds() -> None:
    plain, with_unsloth = (
        set(re.findall(r"^[\w.-]+==\S+", (REQUIREMENTS / f"{name}.txt").read_text(), re.MULTILINE))
        for name in ("trainer", "unsloth")
    )
    assert plain < with_unsloth
    assert {line.partition("==")[0] for line in with_unsloth} >= {"unsloth", "unsloth-zoo", "xformers"}


def test_the_image_s_build_argument_names_a_set_of_requirements() -> None:
    dockerfile = (REQUIREMENTS.parent / "trainer_image" / "Dockerfile").read_text()
    assert "ARG REQUIREMENTS=trainer\n" in dockerfile
    assert "COPY requirements/trainer.txt requirements/unsloth.txt /build/" in dockerfile
    assert '"/build/${REQUIREMENTS}.txt"' in dockerfile
