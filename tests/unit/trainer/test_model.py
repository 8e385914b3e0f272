"""Loading: 4 bit, adapters, device and number types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_trainer import hardware as hardware_module
from qlora_trainer.evaluation import measuring
from qlora_trainer.hardware import Hardware
from qlora_trainer.model import add_adapter, describe, load_quantized, require_isolated_documents
from qlora_trainer.tokenizer import load_tokenizer
from qlorajob.errors import ExitCode, Reason, StepError
from qlorajob.plan import Plan
from qlorajob.precision import NumberTypes
from qlorajob.spec import QLoRAJobSpec
from tests.unit.trainer.jobs import Job

CPU = Hardware("cpu", NumberTypes("float32", "fp32"), "adamw_torch")


def _load(job: Job, folder: Path) -> Any:
    return load_quantized(folder, job.settings(), CPU)


def _inputs(job: Job, *, gpus: int = 0, **changes: Any) -> tuple[QLoRAJobSpec, Plan]:
    config = job.change(**changes).config()
    assert config.plan is not None
    return config.spec, config.plan.model_copy(update={"gpus": gpus})


@pytest.mark.parametrize(
    ("quantization", "kind", "nested"),
    [({}, "nf4", True), ({"type": "fp4"}, "fp4", True), ({"doubleQuant": False}, "nf4", False)],
)
def test_the_quantization_is_what_the_manifest_says(
    job: Job, model_folder: Path, quantization: dict[str, Any], kind: str, nested: bool
) -> None:
    model = _load(job.change(quantization=quantization), model_folder)
    found = describe(model, job.config().spec.quantization)["quantization"]
    assert (found["type"], found["doubleQuant"], found["layers"]) == ([kind], [nested], 14)


@pytest.mark.parametrize(
    ("targets", "count"), [("all-linear", 14), ("default", 4), (["q_proj"], 2), (["layers.0.mlp.up_proj"], 1)]
)
def test_the_adapter_is_where_the_manifest_says(job: Job, model_folder: Path, targets: Any, count: int) -> None:
    job.change(lora={"targetModules": targets})
    model = add_adapter(_load(job, model_folder), job.config().spec.lora)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == count


def test_a_fresh_adapter_changes_no_logit(job: Job, model_folder: Path) -> None:
    base = _load(job, model_folder).eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = add_adapter(base, job.config().spec.lora).eval()(input_ids=ids).logits
    assert torch.equal(before, after)


def test_evaluating_first_leaves_the_weights_trainable(job: Job, model_folder: Path) -> None:
    model = _load(job, model_folder)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


def test_a_family_that_isolates_packed_rows_is_accepted(job: Job, model_folder: Path) -> None:
    model = _load(job, model_folder)
    require_isolated_documents(model)
    assert model.training is False


def test_a_model_in_which_packed_rows_see_each_other_is_refused(
    job: Job, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _load(job, model_folder)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *, position_ids, **inputs: forward(**inputs))
    with pytest.raises(StepError, match="packed rows would see each other") as refused:
        require_isolated_documents(model)
    assert (refused.value.reason, refused.value.field) == (Reason.UNSUPPORTED, "training.packing")


def test_weights_that_are_cut_off_are_told_and_not_tried_again(job: Job, model_folder: Path) -> None:
    broken = job.folder / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StepError, match=r"model\.uri: the weights of .* can't be read") as refused:
        _load(job, broken)
    assert (refused.value.reason, refused.value.code) == (Reason.MODEL_INVALID, ExitCode.INVALID)


@pytest.fixture
def change_model(job: Job, model_folder: Path) -> Callable[..., Path]:
    """The model without some of its weights, or with another config.json."""

    def change(*without: str, **config: Any) -> Path:
        folder = job.folder / "changed"
        shutil.copytree(model_folder, folder)
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if name not in without}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        job.change(model={"uri": f"file://{folder}"})
        return folder

    return change


@pytest.mark.parametrize(
    ("without", "config", "words"),
    [
        (["model.layers.1.mlp.up_proj.weight"], {}, r"there is no model\.layers\.1\.mlp\.up_proj\.weight$"),
        (["model.norm.weight"], {}, r"there is no model\.norm\.weight$"),
        (["lm_head.weight"], {}, r"there is no lm_head\.weight$"),
        ([], {"num_hidden_layers": 3}, r"no model\.layers\.2\..*weight and 8 more that its config\.json asks for"),
        ([], {"intermediate_size": 96}, r"model\.layers\.0\.mlp\.down_proj\.weight is 64×128, and should be 64×96"),
        ([], {"vocab_size": 400}, r"lm_head\.weight is \d+×64, and should be 400×64"),
        ([], {"hidden_size": 32, "head_dim": 16}, r"lm_head\.weight is \d+×64, and should be \d+×32"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_before_they_are_read(
    job: Job, change_model: Callable[..., Path], without: list[str], config: dict[str, Any], words: str
) -> None:
    folder = change_model(*without, **config)
    with pytest.raises(StepError, match=words) as refused:
        _load(job, folder)
    assert (refused.value.reason, refused.value.code) == (Reason.MODEL_INVALID, ExitCode.INVALID)
    assert refused.value.field == "model.uri"


def test_a_head_that_is_the_embeddings_needs_no_weights_of_its_own(job: Job, change_model: Callable[..., Path]) -> None:
    _load(job, change_model("lm_head.weight", tie_word_embeddings=True))


def test_pickled_weights_that_are_cut_off_are_told_and_not_tried_again(job: Job, model_folder: Path) -> None:
    broken = job.folder / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").unlink()
    torch.save(load_file(model_folder / "model.safetensors"), broken / "pytorch_model.bin")
    _load(job, broken)
    content = (broken / "pytorch_model.bin").read_bytes()
    for kept in (0, 100, len(content) // 2):
        (broken / "pytorch_model.bin").write_bytes(content[:kept])
        with pytest.raises(StepError, match=r"model\.uri: the weights of .* can't be read") as refused:
            _load(job, broken)
        assert (refused.value.reason, refused.value.code) == (Reason.MODEL_INVALID, ExitCode.INVALID)


def test_a_missing_pad_token_becomes_the_end_token(job: Job, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder, job.settings())
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "right")


@pytest.fixture
def enlarge(job: Job, model_folder: Path) -> Callable[[Callable[[Any], object]], Path]:
    """The model with tokens that its tokenizer has got since, and its embeddings haven't."""

    def change(add: Callable[[Any], object]) -> Path:
        folder = job.folder / "enlarged"
        shutil.copytree(model_folder, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        add(tokenizer)
        tokenizer.save_pretrained(folder)
        job.change(model={"uri": f"file://{folder}"})
        return folder

    return change


def test_a_pad_token_without_a_vector_becomes_the_end_token(
    job: Job, enlarge: Callable[[Callable[[Any], object]], Path]
) -> None:
    folder = enlarge(lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}))
    assert load_tokenizer(folder, job.settings()).pad_token == "</s>"
    job.train(job.prepare(), micro_batch=2)


def test_a_token_without_a_vector_is_named_before_a_gpu_is_taken(
    job: Job, enlarge: Callable[[Callable[[Any], object]], Path]
) -> None:
    enlarge(lambda tokenizer: tokenizer.add_tokens(["zulu"]))
    with pytest.raises(StepError, match=r"makes token \d+ \('zulu'\), but .* embeddings end at \d+") as refused:
        job.prepare()
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")


def test_measuring_leaves_random_state_and_mode_as_they_were() -> None:
    model = torch.nn.Dropout()
    model.device = torch.device("cpu")  # type: ignore[assignment]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with measuring(model):
        torch.rand(5)
        assert not model.training
    assert model.training
    assert torch.equal(torch.rand(1), expected)


def test_auto_on_cpu_is_float32(job: Job) -> None:
    hardware = Hardware.choose(*_inputs(job))
    assert (hardware.device, hardware.precision, hardware.compute_dtype) == ("cpu", "fp32", torch.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"optimizer": "adamw_8bit"}}, "training.optimizer adamw_8bit runs as adamw_torch"),
        ({"training": {"precision": "fp16"}}, "training.precision fp16 runs as fp32"),
        ({"quantization": {"computeDtype": "float16"}}, "quantization.computeDtype float16 runs as float32"),
    ],
)
def test_what_a_cpu_cannot_do_is_degraded_with_a_reason(job: Job, changes: dict[str, Any], words: str) -> None:
    assert any(words in reason for reason in Hardware.choose(*_inputs(job, **changes)).degradations)


def test_a_planned_gpu_that_is_not_there_is_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hardware_module.ENV_DEVICE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StepError, match="CUDA finds none") as refused:
        Hardware.choose(*_inputs(job, gpus=1))
    assert refused.value.field == "resources.gpuClass"


def test_a_test_cluster_may_train_on_cpu_instead(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware_module.ENV_DEVICE, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Hardware.choose(*_inputs(job, gpus=1)).device == "cpu"


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"), [((8, 0), "bf16", torch.bfloat16), ((7, 5), "fp16", torch.float16)]
)
def test_auto_on_a_gpu_depends_on_what_it_has(
    job: Job, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    hardware = Hardware.choose(*_inputs(job, gpus=1))
    assert (hardware.precision, hardware.compute_dtype, hardware.optimizer) == (precision, dtype, "paged_adamw_8bit")
