"""The five recipes' data: rows as each recipe has them, and the text that is learnt of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data import TrainingData, load_data
from qlora_trainer.tokenizer import load_tokenizer
from tests.golden.recipes import spec_of
from tests.unit.trainer.jobs import Job

BELOW = "Below is an instruction that describes a task"
CONTEXT = ", paired with an input that provides further context"
COMPLETE = ". Write a response that appropriately completes the request.\n\n"


class Recipe:
    """A recipe's dataset section, with files in its place."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self._model = model

    def load(self, name: str, uri: Path, validation: Path | None = None) -> TrainingData:
        job = Job(self.folder, self._model, uri)
        dataset = spec_of(name).to_wire()["dataset"] | {"uri": f"file://{uri}"}
        if validation is not None:
            dataset["validation"]["uri"] = f"file://{validation}"
        job.spec["dataset"] = dataset
        job.change(training={"maxSequenceLength": 2048, "packing": False})
        settings = job.settings()
        self.tokenizer = load_tokenizer(self._model, settings)
        return load_data(settings, self.tokenizer)

    def texts(self, corpus: Any) -> list[str]:
        """What is learnt, whole."""
        return [self.tokenizer.decode(document.input_ids) for document in corpus.documents]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Recipe:
    return Recipe(tmp_path, tiny_llama)


def _json(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def _csv(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_r0_learns_quotes_whole(recipe: Recipe) -> None:
    rows = [{"quote": "“Be yourself; everyone else is already taken.”", "author": "Oscar Wilde", "tags": "inspiration"}]
    data = recipe.load("r0-gpt-neox-20b-quotes", _json(recipe.folder / "quotes.json", rows))
    assert recipe.texts(data.train) == ["“Be yourself; everyone else is already taken.”</s>"]
    (document,) = data.train.documents
    assert document.labels[1:].tolist() == document.input_ids[1:].tolist()


def test_r1_learns_contradictions_with_the_alpaca_prompt(recipe: Recipe) -> None:
    rows = [
        {"gold_label": "neutral", "sentence1": "A man sits.", "sentence2": "He is old."},
        {"gold_label": "contradiction", "sentence1": "A man sits.", "sentence2": "A man runs."},
        {"gold_label": "contradiction", "sentence1": "", "sentence2": "It rains, and it does not."},
        {"gold_label": "-", "sentence1": "A man sits.", "sentence2": "Nobody agrees."},
    ]
    _csv(recipe.folder / "snli" / "snli_1.0_dev.csv", rows[1:2])
    train = _csv(recipe.folder / "snli" / "snli_1.0_train.csv", rows)
    data = recipe.load("r1-llama-2-7b-contradictions", train.parent)
    assert recipe.texts(data.train) == [
        f"{BELOW}{CONTEXT}{COMPLETE}### Instruction:\nWrite a sentence that contradicts the input.\n\n"
        "### Input:\nA man sits.\n\n### Response:\nA man runs.</s>",
        f"{BELOW}{COMPLETE}### Instruction:\nWrite two sentences that contradict each other.\n\n"
        "### Response:\nIt rains, and it does not.</s>",
    ]
    assert data.validation is not None
    assert len(data.validation.documents) == 1
    assert data.summary.dropped == {"filter": 2}
    assert data.encoder.prompt_text("A man sits.").endswith("### Input:\nA man sits.\n\n### Response:\n")


def test_r2_has_chinese_headings(recipe: Recipe) -> None:
    rows = [
        {"instruction": "翻译成英文", "input": "你好", "output": "Hello"},
        {"instruction": "写一句问候", "input": "", "output": "你好！"},
    ]
    data = recipe.load("r2-qwen2-7b-instructions", _json(recipe.folder / "instructions.json", rows))
    assert recipe.texts(data.train) == [
        "### 指令:\n翻译成英文\n\n### 输入:\n你好\n\n### 回答:\nHello</s>",
        "### 指令:\n写一句问候\n\n### 回答:\n你好！</s>",
    ]


def test_r3_learns_its_conversations_as_they_stand(recipe: Recipe) -> None:
    rows = [{"text": "<s>[INST] Me gradué hace poco [/INST] ¡Enhorabuena! </s>"}]
    data = recipe.load("r3-llama3-chatqa-8b-guanaco", _json(recipe.folder / "guanaco.json", rows))
    assert recipe.texts(data.train) == ["<s>[INST] Me gradué hace poco [/INST] ¡Enhorabuena! </s>"]


def test_r4_drops_duplicates_and_what_stands_in_the_validation_file(recipe: Recipe) -> None:
    rows = [
        {"instruction": "年假", "output": "每年十天"},
        {"instruction": "年假", "output": "每年十天"},
        {"instruction": "报销", "output": "三十天内"},
        {"instruction": "打卡", "output": "九点"},
    ]
    train = _json(recipe.folder / "train.json", rows)
    data = recipe.load("r4-chatglm2-6b-knowledge-base", train, _json(recipe.folder / "validation.json", rows[3:]))
    assert recipe.texts(data.train) == [
        "[Round 1]\n\n问：年假\n\n答：每年十天</s>",
        "[Round 1]\n\n问：报销\n\n答：三十天内</s>",
    ]
    assert recipe.texts(data.validation) == ["[Round 1]\n\n问：打卡\n\n答：九点</s>"]
    assert data.summary.dropped == {"duplicate": 2}
