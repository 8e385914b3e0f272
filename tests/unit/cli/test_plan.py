"""`qlora plan` and `qlora render`: answers without a cluster, from the catalogue or a config.json, and quickly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from qlora_cli.main import main
from qlorajob.plan import Plan

JOB = """
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: small}
spec:
  model: {uri: "MODEL"}
  dataset: {uri: "hf://organisation/data"}
  output: {uri: "s3://bucket/prefix"}
"""
TINY = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "vocab_size": 1000,
}  # fmt: skip
HEAVY = {"torch", "transformers", "kubernetes", "kopf", "aiohttp", "boto3", "peft", "numpy", "hypothesis"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(model: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(JOB.replace("MODEL", model))
        return path

    return to_file


def run(command: str, manifest: Path, *options: str | Path) -> Result:
    return CliRunner().invoke(main, [command, str(manifest), *map(str, options)], catch_exceptions=False)


def planned(manifest: Path, *options: str | Path) -> dict[str, Any]:
    result = run("plan", manifest, "--output", "json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_model_of_the_catalogue_is_planned_offline(write: Callable[[str], Path]) -> None:
    found = planned(write("hf://meta-llama/Llama-2-7b-hf@main"))
    assert found.keys() == {"predictedPeakBytes", "breakdown", "plan", "classes"}
    assert found["predictedPeakBytes"] == sum(found["breakdown"].values()) == found["plan"]["predictedPeakBytes"]
    assert Plan.model_validate(found["plan"]).gpus == 1


def test_every_class_is_listed_with_what_it_holds(write: Callable[[str], Path]) -> None:
    classes = {each["name"]: each for each in planned(write("hf://meta-llama/Llama-2-70b-hf"))["classes"]}
    assert classes["T4"]["fits"] is False
    assert classes["H100"]["fits"] is True
    for each in classes.values():
        assert each["fits"] == (each["smallestPeakBytes"] <= each["usableBytes"])
        assert (each["predictedTokensPerSecond"] is None) == (not each["fits"])


def test_a_gpu_can_be_named(write: Callable[[str], Path]) -> None:
    found = planned(write("hf://meta-llama/Llama-2-7b-hf"), "--gpu", "A100-80GB-3g.40gb")
    assert found["plan"]["gpuClass"] == "A100-80GB-3g.40gb"
    assert [each["name"] for each in found["classes"]] == ["A100-80GB-3g.40gb"]


def test_what_if_changes_any_field(write: Callable[[str], Path]) -> None:
    manifest = write("hf://meta-llama/Llama-2-7b-hf")
    changed = planned(
        manifest,
        "--gpu",
        "L4",
        "--what-if",
        "training.maxSequenceLength=256",
        "--what-if",
        "lora.targetModules=[q_proj]",
    )
    assert changed["predictedPeakBytes"] < planned(manifest, "--gpu", "L4")["predictedPeakBytes"]
    cpu = planned(manifest, "--what-if", "spec.resources.gpuClass=cpu")
    assert (cpu["plan"]["gpus"], cpu["classes"]) == (0, [])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("training.maxSeqLength=8192", "spec.training.maxSeqLength: unknown field; did you mean maxSequenceLength?"),
        ("training.maxSequenceLength=many", "spec.training.maxSequenceLength: must be an integer"),
        ("training", "must be a field and its value"),
        ("model.uri.x=1", "uri has no fields"),
        ("lora.rank=[", "is not valid YAML"),
    ],
)
def test_a_question_that_makes_no_sense_is_told_so(write: Callable[[str], Path], question: str, message: str) -> None:
    result = run("plan", write("hf://meta-llama/Llama-2-7b-hf"), "--what-if", question)
    assert result.exit_code == 64
    assert message in result.stderr


def test_a_config_json_is_enough(write: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for option in (tmp_path, tmp_path / "config.json"):
        found = planned(write("s3://bucket/model"), "--config", option)
        assert found["breakdown"]["weights16Bit"] < 10**6
    (tmp_path / "My Model").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "My Model" / "config.json")
    assert planned(write(f"file://{tmp_path}/My%20Model"))["plan"] == found["plan"]


@pytest.mark.parametrize("uri", ["hf://organisation/unheard-of", "s3://bucket/model", "pvc://claim/model"])
def test_a_model_that_cannot_be_known_here_says_what_to_do(write: Callable[[str], Path], uri: str) -> None:
    result = run("plan", write(uri))
    assert result.exit_code == 64
    assert f"spec.model.uri: {uri}" in result.stderr
    assert "--config" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no model's config.json"), ("[]", "aren't known"), ('{"model_type": "odd"}', "models of type odd")],
)
def test_a_config_that_says_nothing_is_told_so(
    write: Callable[[str], Path], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    result = run("plan", write("s3://bucket/model"), "--config", tmp_path)
    assert result.exit_code == 64
    assert message in result.stderr


def test_what_does_not_fit_says_what_would(write: Callable[[str], Path]) -> None:
    manifest = write("hf://meta-llama/Llama-2-70b-hf")
    result = run("plan", manifest, "--gpu", "T4", "--output", "json")
    assert result.exit_code == 64
    found = json.loads(result.stdout)
    assert found["plan"] is None
    assert found["doesNotFit"]["suggestions"] == [{"field": "resources.gpuClass", "value": "auto"}]
    assert "it would fit with resources.gpuClass: auto" in " ".join(run("plan", manifest, "--gpu", "T4").stdout.split())


def test_the_table_shows_components_classes_and_why(write: Callable[[str], Path]) -> None:
    table = run("plan", write("hf://meta-llama/Llama-2-70b-hf")).stdout
    for words in ("weights in 4 bit", "█", "predicted peak", "✗", "▶", "micro batch", "is the cheapest class"):
        assert words in " ".join(table.split())


def test_nothing_heavy_is_imported(write: Callable[[str], Path]) -> None:
    """Which is why it answers in half a second."""
    program = (
        "import sys; from click.testing import CliRunner; from qlora_cli.main import main\n"
        f"result = CliRunner().invoke(main, ['plan', {str(write('hf://meta-llama/Llama-2-7b-hf'))!r}])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


# render


def test_render_prints_the_jobs_of_every_step(write: Callable[[str], Path], tmp_path: Path) -> None:
    result = run("render", write("hf://meta-llama/Llama-2-7b-hf"))
    assert result.exit_code == 0, result.output
    jobs = list(YAML(typ="safe", pure=True).load_all(result.stdout))
    assert [job["metadata"]["labels"]["app.kubernetes.io/component"] for job in jobs] == ["prepare", "train"]
    assert "nvidia.com/gpu" in jobs[1]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "known-after-prepare" in result.stdout


def test_render_refuses_what_fits_nowhere(write: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 2000, "hidden_size": 16384}))
    result = run("render", write("s3://bucket/model"), "--config", tmp_path)
    assert result.exit_code == 64
    assert "DoesNotFit: spec.resources.gpuClass" in result.stderr


def test_no_number_loses_a_digit_in_a_narrow_terminal(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = run(
        "plan", write("hf://meta-llama/Llama-2-7b-hf"), "--what-if", "training.gradientCheckpointing=true"
    ).stdout
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 60
    assert "all layers again" in " ".join(shown.split())
