"""prepare: what it finds out, and what it refuses before any GPU is asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_vram.positions import TABLES, longest_row
from qlorajob.errors import Reason, StepError
from tests.unit.trainer.jobs import Job


def test_the_facts_are_those_of_the_model(job: Job, model_folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", framework="pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    facts = job.prepare().facts
    assert (facts.model_type, facts.layers, facts.hidden_size) == ("llama", 2, 64)
    assert facts.parameters == parameters
    assert facts.weight_bytes == (model_folder / "model.safetensors").stat().st_size


def test_rows_and_steps_are_counted(job: Job) -> None:
    prepared = job.prepare()
    assert (prepared.train_rows, prepared.validation_rows, prepared.total_steps) == (43, 5, 4)


def test_the_same_inputs_give_the_same_run(job: Job) -> None:
    assert job.prepare().run_id == job.prepare().run_id


def test_a_copy_of_the_model_elsewhere_is_the_same_run(job: Job, model_folder: Path, tmp_path: Path) -> None:
    first = job.prepare().run_id
    shutil.copytree(model_folder, tmp_path / "copy")
    assert job.change(model={"uri": f"file://{tmp_path}/copy"}).prepare().run_id == first


def test_another_revision_of_the_model_is_another_run(job: Job, model_folder: Path, tmp_path: Path) -> None:
    first = job.prepare().run_id
    changed = tmp_path / "changed"
    shutil.copytree(model_folder, changed)
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert job.change(model={"uri": f"file://{changed}"}).prepare().run_id != first


def test_a_claim_is_read_where_it_is_mounted(job: Job, model_folder: Path) -> None:
    mounted = job.folder / "mounts" / "pvc" / "models" / "tiny"
    shutil.copytree(model_folder, mounted)
    assert job.change(model={"uri": "pvc://models/tiny"}).prepare().facts.layers == 2


def _refusal(job: Job) -> StepError:
    with pytest.raises(StepError) as refused:
        job.prepare()
    return refused.value


CASES: list[Any] = [
    pytest.param(
        {"model": {"uri": "file:///no/such/model"}}, Reason.MODEL_NOT_FOUND, "model.uri", "there is no /no/such/model",
        id="unknown model",
    ),
    pytest.param(
        {"lora": {"targetModules": ["q_proj", "query_key_value"]}},
        Reason.TARGET_MODULES_NOT_FOUND, "lora.targetModules",
        "the model has no linear layer query_key_value; it has q_proj, k_proj, v_proj, o_proj, gate_proj",
        id="target module of another family",
    ),
    pytest.param(
        {"lora": {"targetModules": ["q_proj", "lm_head"]}}, Reason.UNSUPPORTED, "lora.targetModules",
        "lm_head is the output head", id="target module is the head",
    ),
    pytest.param(
        {"model": {"trustRemoteCode": True}}, Reason.REMOTE_CODE_REFUSED, "model.trustRemoteCode",
        "operator doesn't allow remote code", id="policy forbids remote code",
    ),
    pytest.param(
        {"dataset": {"uri": "file:///no/such/data.jsonl"}}, Reason.DATASET_NOT_FOUND, "dataset.uri",
        "there is no /no/such/data.jsonl", id="unknown dataset",
    ),
    pytest.param(
        {"dataset": {"columns": {"output": "answer"}}}, Reason.COLUMN_MISSING, "dataset.columns.output",
        "there is no column answer; the dataset has instruction, input, output", id="missing column",
    ),
    pytest.param(
        {"dataset": {"template": "{{ instruction"}}, Reason.TEMPLATE_INVALID, "dataset.template",
        "not a Jinja template", id="broken template",
    ),
    pytest.param(
        {"dataset": {"filter": {"input": "nothing"}}}, Reason.DATASET_EMPTY, "dataset.filter",
        "no row is left", id="filter keeps nothing",
    ),
    pytest.param(
        {"training": {"backend": "unsloth"}}, Reason.UNSUPPORTED, "training.backend", "unsloth", id="unsloth",
    ),
    pytest.param(
        {"merge": {"enabled": True, "gguf": {"quantization": "q4_k_m"}}}, Reason.UNSUPPORTED, "merge.gguf",
        "llama.cpp can't take this model", id="gguf",
    ),
    pytest.param(
        {"resources": {"gpuClass": None, "gpus": 2}}, Reason.UNSUPPORTED, "resources.gpus", "several GPUs", id="gpus",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason", "field", "words"), CASES)
def test_what_cannot_work_is_refused_with_the_field_and_what_to_do(
    job: Job, changes: dict[str, Any], reason: Reason, field: str, words: str
) -> None:
    refusal = _refusal(job.change(**changes))
    assert (refusal.reason, refusal.field) == (reason, field)
    assert refusal.message.startswith(f"{field}: ") or refusal.message.startswith("dataset: ")
    assert words in refusal.message


ChangedModel = Callable[..., Path]


@pytest.fixture
def changed_model(tmp_path: Path, model_folder: Path) -> ChangedModel:
    """The tiny model with changes to its config, and without some files."""

    def change(*, without: str | None = None, **config: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns(without) if without else None)
        if (folder / "config.json").exists():
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(content | config))
        return folder

    return change


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        pytest.param({"without": "config.json"}, Reason.MODEL_NOT_FOUND, "no config.json", id="no config"),
        pytest.param({"without": "*.safetensors"}, Reason.MODEL_INVALID, "no weights", id="no weights"),
        pytest.param({"without": "tokenizer*"}, Reason.MODEL_INVALID, "no usable tokenizer", id="no tokenizer"),
        pytest.param({"model_type": "no-such"}, Reason.MODEL_INVALID, "config of .* can't be read", id="unknown type"),
        pytest.param({"model_type": "clip"}, Reason.MODEL_INVALID, "isn't a causal language model", id="no LM"),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            Reason.MODEL_INVALID,
            "already quantized",
            id="quantized",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    job: Job, changed_model: ChangedModel, changes: dict[str, Any], reason: Reason, words: str
) -> None:
    refusal = _refusal(job.change(model={"uri": f"file://{changed_model(**changes)}"}))
    assert (refusal.reason, refusal.field) == (reason, "model.uri")
    assert re.search(words, refusal.message)


REMOTE_CODE = {"model_type": "chatglm", "auto_map": {"AutoModelForCausalLM": "modeling.ChatGLM"}}


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("model-00002-*", "lacks weights: model.safetensors.index.json names model-00002-of-"),
        ("*.index.json", "has neither model.safetensors nor pytorch_model.bin, nor an index of parts"),
    ],
)
def test_a_model_of_which_a_part_is_missing_is_refused(
    job: Job, model_folder: Path, tmp_path: Path, without: str, words: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "parts"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="60KB")
    job.change(model={"uri": f"file://{folder}"})
    assert job.prepare().facts.layers == 2
    for file in folder.glob(without):
        file.unlink()
    refusal = _refusal(job)
    assert (refusal.reason, refusal.field) == (Reason.MODEL_INVALID, "model.uri")
    assert words in refusal.message


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("without", "config", "words"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            {},
            r"lacks weights: there is no model\.layers\.1\.mlp\.up_proj\.weight$",
        ),
        (
            None,
            {"num_hidden_layers": 3},
            r"there is no model\.layers\.2\.\S+ and 6 more that its config\.json asks for",
        ),
    ],
)
def test_a_model_of_which_a_layer_s_weights_are_missing_is_refused(
    job: Job, changed_model: ChangedModel, shards: int, without: str | None, config: dict[str, Any], words: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed_model(**config)
    weights = load_file(folder / "model.safetensors")
    weights.pop(without or "", None)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").unlink()
        names = [f"model-{number}.safetensors" for number in range(shards)]
        for number, name in enumerate(names):
            save_file(dict([*weights.items()][number::shards]), folder / name)
        index = {key: names[number % shards] for number, key in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refusal = _refusal(job.change(model={"uri": f"file://{folder}"}))
    assert (refusal.reason, refusal.field) == (Reason.MODEL_INVALID, "model.uri")
    assert re.search(words, refusal.message)


@pytest.mark.parametrize("kept", [0, 5, 100, -100])
def test_weights_that_are_cut_off_are_refused(job: Job, changed_model: ChangedModel, kept: int) -> None:
    weights = changed_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refusal = _refusal(job.change(model={"uri": f"file://{weights.parent}"}))
    assert (refusal.reason, refusal.field) == (Reason.MODEL_INVALID, "model.uri")
    assert re.search(r"can't be read: model\.safetensors is(n't| cut off)", refusal.message)


def test_names_that_another_library_gave_the_weights_are_not_held_against_them(
    job: Job, changed_model: ChangedModel
) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed_model()
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")
    assert job.change(model={"uri": f"file://{folder}"}).prepare().total_steps == 4


def test_a_model_with_code_of_its_own_needs_trust(job: Job, changed_model: ChangedModel) -> None:
    refusal = _refusal(job.change(model={"uri": f"file://{changed_model(**REMOTE_CODE)}"}))
    assert (refusal.reason, refusal.field) == (Reason.REMOTE_CODE_REFUSED, "model.trustRemoteCode")
    assert "read that code, then set this to true" in refusal.message


def test_a_trusted_model_with_code_of_its_own_is_not_packed(job: Job, changed_model: ChangedModel) -> None:
    job.remote_code_allowed = True
    model = {"uri": f"file://{changed_model(**REMOTE_CODE)}", "trustRemoteCode": True}
    refusal = _refusal(job.change(model=model))
    assert (refusal.reason, refusal.field) == (Reason.UNSUPPORTED, "training.packing")


def test_a_family_whose_packed_rows_would_see_each_other_is_refused(job: Job, changed_model: ChangedModel) -> None:
    job = job.change(model={"uri": f"file://{changed_model(model_type='mpt')}"})
    refusal = _refusal(job)
    assert (refusal.reason, refusal.field) == (Reason.UNSUPPORTED, "training.packing")
    assert job.change(training={"packing": False}).prepare().total_steps == 4


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        (
            {},
            "training.maxSequenceLength",
            "a row has 33 tokens, but the model has positions for 32 only; set 32 or less",
        ),
        (
            {"training": {"maxSequenceLength": 32}, "evaluation": {"prompts": ["a"], "maxNewTokens": 40}},
            "evaluation.maxNewTokens",
            "to come, but the model has positions for 32 only; set less",
        ),
    ],
)
def test_what_goes_beyond_a_model_s_table_of_positions_is_refused_before_a_gpu_is_taken(
    job: Job, changed_model: ChangedModel, fields: dict[str, Any], field: str, words: str
) -> None:
    job.change(model={"uri": f"file://{changed_model(model_type='gptj', n_positions=32, rotary_dim=8)}"})
    job.change(
        dataset={"template": "{{ instruction }} {{ output }} " + "zulu " * 30}, training={"maxSequenceLength": 33}
    )
    refusal = _refusal(job.change(**fields))
    assert (refusal.reason, refusal.field) == (Reason.UNSUPPORTED, field)
    assert words in refusal.message


@pytest.mark.parametrize("model_type", sorted(TABLES))
def test_tables_of_positions_end_where_transformers_end_them(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    assert longest_row({"model_type": model_type}) == longest_row(config.to_dict())


def test_the_default_layers_of_a_known_family_are_accepted(job: Job) -> None:
    assert job.change(lora={"targetModules": "default"}).prepare().total_steps == 4


def test_a_prompt_that_the_template_cannot_take_is_refused_before_a_gpu_is_asked_for(
    job: Job, write_rows: Callable[..., Path]
) -> None:
    rows = write_rows({"instruction": "a|b", "output": "x"}, {"instruction": "c|d", "output": "y"})
    template = "{{ instruction.split('|')[1] }}: {{ output }}"
    job.change(dataset={"uri": f"file://{rows}", "template": template, "validation": None})
    refusal = _refusal(job.change(evaluation={"prompts": ["undivided"]}))
    assert (refusal.reason, refusal.field) == (Reason.TEMPLATE_INVALID, "dataset.template")
    assert "a prompt of evaluation.prompts" in refusal.message


def test_a_prompt_of_which_the_template_leaves_nothing_is_refused_before_a_gpu_is_asked_for(job: Job) -> None:
    job.change(dataset={"template": "{{ output }} is the {{ instruction }}"}, evaluation={"prompts": ["code of zulu"]})
    refusal = _refusal(job)
    assert (refusal.reason, refusal.field) == (Reason.TEMPLATE_INVALID, "evaluation.prompts")
    assert "dataset.template has nothing before its output" in refusal.message
