"""The GGUF export, read by llama.cpp itself: its logits, its answers, and what it refuses."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from transformers import AutoModelForCausalLM, AutoTokenizer

import weights
from qlora_trainer import gguf_export
from qlorajob.errors import ExitCode, Reason, StepError
from tests.support import tiny

TEXT = "The capital of France is the city of"


def llama(tool: str, *arguments: str | Path) -> str:
    """Run one of llama.cpp's programs; what it prints and logs."""
    program = gguf_export.TOOLS / tool
    assert program.exists(), f"{program} isn't there: make llama-cpp"
    command, both = [program, *arguments], subprocess.STDOUT
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=both, text=True, check=True, timeout=300).stdout


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, whose tokenizer llama.cpp knows."""
    return weights.ensure()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A small random Llama, with rows as wide as the k-quants need."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny.write_model(folder, smollm2, width=256, initializer_range=0.05, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    """The model in each quantization."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {
        kind: gguf_export.export(model, folder, "My job/1", kind, base="Small-1M", trust_remote_code=False)
        for kind in ("f16", "q8_0", "q4_k_m")
    }
    assert sorted(folder.iterdir()) == sorted(made.values())  # nothing is left over
    return made


@dataclass(frozen=True)
class Read:
    """What llama.cpp finds in a file: the logits for the token after TEXT, and what it logs while it loads."""

    logits: Any
    log: str

    def kinds(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return {kind: int(number) for kind, number in re.findall(r"- type +(\w+): +(\d+) tensors", self.log)}

    def says(self, key: str) -> str:
        """A text that the file holds under a key."""
        (found,) = re.findall(rf"kv +\d+: +{re.escape(key)} str += (.+)", self.log)
        return str(found).strip()

    def said(self, what: str) -> str:
        """A property of the file."""
        (found,) = re.findall(rf"print_info: {what} += (.+)", self.log)
        return str(found).strip()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path]) -> dict[str, Read]:
    """Each file as llama.cpp reads it."""
    folder = tmp_path_factory.mktemp("read")
    options = ("-p", TEXT, "--save-logits", "--logits-output-dir", folder, "-t", "2", "--log-verbosity", "4")
    logs = {kind: llama("llama-debug", "-m", file, *options) for kind, file in files.items()}
    return {
        kind: Read(np.fromfile(folder / f"llamacpp-{files[kind].stem}.bin", np.float32), logs[kind]) for kind in logs
    }


@pytest.fixture(scope="module")
def wanted(model: Path) -> tuple[Any, Any]:
    """The same weights in float32 in transformers, and the tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded, AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize(("kind", "error"), [("f16", 0.005), ("q8_0", 0.05), ("q4_k_m", 0.2)])
def test_llama_cpp_computes_what_transformers_does(
    wanted: tuple[Any, Any], read: dict[str, Read], kind: str, error: float
) -> None:
    loaded, tokenizer = wanted
    with torch.no_grad():
        logits = loaded(tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits[0, -1].numpy()
    assert float(np.linalg.norm(read[kind].logits - logits) / np.linalg.norm(logits)) < error


def test_q4_k_m_is_the_mixture_that_llama_cpp_calls_so(read: dict[str, Read]) -> None:
    assert read["q4_k_m"].said("file type") == "Q4_K - Medium"
    assert read["q4_k_m"].kinds().keys() == {"q4_K", "q6_K", "f32"}


def test_sizes_are_those_of_the_quantization(read: dict[str, Read]) -> None:
    weights_of = {kind: float(read[kind].said("file size").partition(" MiB")[0]) for kind in read}
    assert weights_of["q8_0"] / weights_of["f16"] == pytest.approx(8.5 / 16, rel=0.01)
    assert 4.5 / 16 < weights_of["q4_k_m"] / weights_of["f16"] < 6.6 / 16  # the embeddings of this one are Q6_K


def test_the_chat_template_travels_in_the_file(wanted: tuple[Any, Any], files: dict[str, Path]) -> None:
    template = wanted[1].chat_template.encode()
    text = struct.pack("<IQ", GGUFValueType.STRING, len(template)) + template
    assert b"tokenizer.chat_template" + text in files["f16"].read_bytes()


def test_the_file_is_named_after_the_job(files: dict[str, Path]) -> None:
    assert files["q4_k_m"].name == "My-job-1-q4_k_m.gguf"


def test_the_model_is_called_as_its_base_in_the_file_whatever_folder_it_came_from(read: dict[str, Read]) -> None:
    assert [read[kind].says("general.name") for kind in read] == ["Small-1M"] * len(read)


def test_an_answer_is_what_transformers_generates(wanted: tuple[Any, Any], files: dict[str, Path]) -> None:
    loaded, tokenizer = wanted
    for text in ("Once upon a time\n", r"a path like C:\new\table", "--help", "<|im_start|>user\nHi<|im_end|>\n"):
        asked = tokenizer(text, return_tensors="pt")["input_ids"]
        said = loaded.generate(asked, max_new_tokens=4, do_sample=False)[0, asked.shape[1] :]
        assert gguf_export.answer(files["f16"], text, 4) == tokenizer.decode(said), text


def test_a_chat_that_begins_with_the_first_token_gets_no_second_one(
    wanted: tuple[Any, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    content, flag = files["f16"].read_bytes(), b"tokenizer.ggml.add_bos_token" + struct.pack("<I", GGUFValueType.BOOL)
    assert content.count(flag + b"\0") == 1
    file = tmp_path / "adds.gguf"
    file.write_bytes(content.replace(flag + b"\0", flag + b"\1"))  # as in Llama 3's and Gemma's files
    loaded, tokenizer = wanted
    text = f"{tokenizer.bos_token}user\nHow many are there?"
    asked = tokenizer(text, return_tensors="pt")["input_ids"]
    said = tokenizer.decode(loaded.generate(asked, max_new_tokens=4, do_sample=False)[0, asked.shape[1] :])
    assert gguf_export.answer(file, text, 4, bos=tokenizer.bos_token) == said
    assert gguf_export.answer(file, text, 4) != said  # or this would show nothing


def test_a_file_that_llama_cpp_can_t_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(StepError, match="can't take this model") as caught:
        gguf_export.answer(tmp_path / "broken.gguf", "Hello", 1)
    assert caught.value.field == "merge.gguf"


def test_a_tokenizer_that_llama_cpp_doesn_t_know_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="can't take this model") as caught:
        gguf_export.check(model_folder, tmp_path, trust_remote_code=False)
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "merge.gguf")
    assert "tokenizer" in caught.value.message


def test_an_architecture_that_llama_cpp_doesn_t_know_is_refused(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "model", architectures=["UnheardOfForCausalLM"])
    with pytest.raises(StepError, match="UnheardOfForCausalLM"):
        gguf_export.check(folder, tmp_path, trust_remote_code=False)


def test_a_model_that_can_be_converted_passes_without_its_weights(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "model")
    gguf_export.check(folder, tmp_path, trust_remote_code=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_image_without_llama_cpp_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "TOOLS", tmp_path)
    with pytest.raises(StepError, match=r"this trainer image has no llama\.cpp") as caught:
        gguf_export.check(model, tmp_path, trust_remote_code=False)
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "merge.gguf")


def test_a_full_disk_is_told_from_a_model_that_can_t_be_converted(model: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        gguf_export._convert(model, Path("/dev/full"), "f16")


def test_a_tool_that_is_killed_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="stopped by signal 9") as caught:
        gguf_export._run(["bash", "-c", "kill -9 $$"], tool="bash")
    assert caught.value.code is ExitCode.TRANSIENT
    assert caught.value.reason is Reason.OUT_OF_MEMORY


@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_the_model_s_folder_runs_only_where_it_is_trusted(model: Path, tmp_path: Path, trusted: bool) -> None:
    marker, scratch = tmp_path / "was-run", tmp_path / "scratch"
    scratch.mkdir()
    folder = copy_of(model, tmp_path / "model", architectures=["ChatGLMForConditionalGeneration"], model_type="chatglm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokens.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('it ran')\n")
    with pytest.raises(StepError):  # the tokenizer is broken either way
        gguf_export.check(folder, scratch, trust_remote_code=trusted)
    assert marker.exists() == trusted


def copy_of(model: Path, folder: Path, **config: Any) -> Path:
    """A model's files without its weights, with another config."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder
