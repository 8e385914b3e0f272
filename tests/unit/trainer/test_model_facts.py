"""What prepare learns of a model: from its config.json where that is enough, else from its modules."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlorajob.errors import Reason, StepError
from qlorajob.run import RunReport
from tests.support.families import FAMILIES, write_model
from tests.unit.trainer.jobs import Job

ROOT = Path(__file__).parents[3]
PREPARE = """
import json, sys
from qlora_trainer.__main__ import main
code = main(["prepare"])
print("\\n" + json.dumps({"code": code, "torch": "torch" in sys.modules, "peft": "peft" in sys.modules}))
"""

OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(64, 8, bias=False)
"""

ModelOf = Callable[..., Path]


@pytest.fixture
def model_of(tmp_path: Path, model_folder: Path) -> ModelOf:
    """The tiny model under another model type."""

    def change(model_type: str, **config: Any) -> Path:
        folder = tmp_path / model_type
        shutil.copytree(model_folder, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"model_type": model_type} | config))
        return folder

    return change


def _process(job: Job) -> tuple[dict[str, Any], RunReport]:
    """Prepare in a process of its own: what it imported, and its report."""
    environment = {**os.environ, **job.environment(job.config()), "PYTHONPATH": f"{ROOT}/operator:{ROOT}/trainer_image"}
    command = [sys.executable, "-c", PREPARE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "PyTorch was not found" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), RunReport.model_validate_json(
        (job.folder / "report.json").read_text()
    )


def test_a_known_family_is_prepared_without_torch(job: Job) -> None:
    imported, report = _process(job.change(lora={"targetModules": "default"}))
    assert imported == {"code": 0, "torch": False, "peft": False}
    assert report.prepared == job.prepare()  # which runs in this process, where torch is imported


def test_a_family_that_is_not_known_is_built_and_looked_at(job: Job, model_of: ModelOf) -> None:
    imported, report = _process(job.change(model={"uri": f"file://{model_of('helium')}"}))
    assert imported["code"] == 0
    assert imported["torch"]
    assert report.prepared is not None
    facts = report.prepared.facts
    assert (facts.model_type, facts.layers, facts.key_value_heads) == ("helium", 2, 2)
    assert {linear.name for linear in facts.linears} >= {"q_proj", "down_proj"}
    assert facts.parameters == sum(
        (
            facts.quantized_parameters,
            facts.embedding_parameters,
            facts.head_parameters,
            facts.expert_parameters,
            facts.other_parameters,
        )
    )


@pytest.mark.parametrize("model_type", ["llama", "helium"])
@pytest.mark.parametrize(
    ("targets", "reason", "words"),
    [
        (
            ["q_proj", "query_key_value"],
            Reason.TARGET_MODULES_NOT_FOUND,
            "the model has no linear layer query_key_value; "
            "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$",
        ),
        (
            ["layers.2.mlp.up_proj"],
            Reason.TARGET_MODULES_NOT_FOUND,
            "the model has no linear layer layers.2.mlp.up_proj",
        ),
        (["q_proj", "lm_head"], Reason.UNSUPPORTED, "lm_head is the output head"),
    ],
)
def test_target_modules_are_checked_the_same_way_with_torch_and_without(
    job: Job, model_of: ModelOf, model_type: str, targets: list[str], reason: Reason, words: str
) -> None:
    job.change(model={"uri": f"file://{model_of(model_type)}"}, lora={"targetModules": targets})
    with pytest.raises(StepError) as refused:
        job.prepare()
    assert (refused.value.reason, refused.value.field) == (reason, "lora.targetModules")
    assert re.search(words, refused.value.message)


@pytest.mark.parametrize("target", ["q_proj", "mlp.up_proj", "model.layers.1.self_attn.o_proj"])
def test_a_layer_may_be_named_by_any_end_of_its_path(job: Job, target: str) -> None:
    assert job.change(lora={"targetModules": [target]}).prepare().total_steps == 4


def test_default_layers_of_a_family_without_any_are_refused(job: Job, model_of: ModelOf) -> None:
    job.change(model={"uri": f"file://{model_of('granite')}"}, lora={"targetModules": "default"})
    with pytest.raises(StepError, match="PEFT has no default layers for granite; set all-linear or name the layers"):
        job.prepare()


@pytest.fixture
def mixture(model_of: ModelOf) -> Path:
    """Experts whose weights are stacked in one parameter, as transformers has them."""
    return model_of("mixtral", num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "lora.dropout", "set 0, or name other layers in lora.targetModules"),
        ({"lora": {"dropout": 0}, "merge": {"enabled": True}}, "merge.enabled", "set false"),
        ({"lora": {"targetModules": "default"}}, "lora.targetModules", "PEFT"),
    ],
)
def test_experts_that_peft_cannot_adapt_or_merge_are_refused_before_a_gpu_is_taken(
    job: Job, mixture: Path, fields: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(StepError, match=words) as refused:
        job.change(model={"uri": f"file://{mixture}"}, **fields).prepare()
    assert refused.value.field == field


@pytest.mark.parametrize(
    "fields", [{"lora": {"dropout": 0}}, {"lora": {"targetModules": ["q_proj"]}, "merge": {"enabled": True}}]
)
def test_experts_may_be_adapted_without_dropout_or_left_alone(job: Job, mixture: Path, fields: dict[str, Any]) -> None:
    assert job.change(model={"uri": f"file://{mixture}"}, **fields).prepare().facts.expert_parameters


@pytest.mark.parametrize("value", ["many", 0, -2, 2.5, None])
def test_a_config_with_an_impossible_number_names_it(job: Job, model_of: ModelOf, value: Any) -> None:
    folder = model_of("llama", num_attention_heads=value)
    with pytest.raises(StepError, match=r"can't be read: config\.json: num_attention_heads must be") as refused:
        job.change(model={"uri": f"file://{folder}"}).prepare()
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")


def test_trusted_code_is_looked_at_whatever_its_model_type_says(job: Job, model_of: ModelOf) -> None:
    """Its classes may be others than transformers', so facts of its model type wouldn't be facts of the model."""
    plain = job.prepare().facts
    folder = model_of("llama", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (folder / "own.py").write_text(OWN_CODE)
    job.remote_code_allowed = True
    job.change(model={"uri": f"file://{folder}", "trustRemoteCode": True}, training={"packing": False})
    _, report = _process(job)
    assert report.prepared is not None
    assert report.prepared.facts.parameters == plain.parameters + 64 * 8
    assert (plain.regular_length, report.prepared.facts.regular_length) == (None, 0)  # never on the fast path


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        (
            "modeling",
            "import nothing_like_it",
            r"chatglm\) can't be built by the code that comes with it: .*nothing_like",
        ),
        ("modeling", "class ChatGLMForConditionalGeneration(: pass", r"the code that comes with it: SyntaxError"),
        (
            "modeling",
            "from transformers import PreTrainedModel\n"
            "from .configuration_chatglm import ChatGLMConfig\n"
            "class ChatGLMForConditionalGeneration(PreTrainedModel):\n"
            "    config_class = ChatGLMConfig\n"
            "    def __init__(self, config):\n"
            "        super().__init__(config)\n"
            "        config.hidden_size.no_such_thing()\n",
            r"the code that comes with it: AttributeError: 'int' object has no attribute 'no_such_thing'",
        ),
        ("configuration", "raise SystemError('too old')", r"the config of .* can't be read: too old"),
    ],
)
def test_own_code_that_fails_is_told_before_a_gpu_is_taken_even_of_a_family_that_is_known(
    job: Job, tmp_path: Path, tokenizer: Any, file: str, code: str, words: str
) -> None:
    chatglm = next(family for family in FAMILIES if family.own_code)
    folder = write_model(chatglm, tokenizer, tmp_path / "chatglm")
    job.remote_code_allowed = True
    job.change(model={"uri": f"file://{folder}", "trustRemoteCode": True}, training={"packing": False})
    (folder / f"{file}_chatglm.py").write_text(code)
    with pytest.raises(StepError, match=words) as refused:
        job.prepare()
    assert (refused.value.reason, refused.value.field) == (Reason.MODEL_INVALID, "model.uri")
