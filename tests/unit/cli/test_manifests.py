"""Reading a manifest from a file for `qlora run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.manifests import ManifestError, load_manifest

JOB = """
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: small}
spec:
  model: {uri: "file:///models/tiny"}
  dataset: {uri: "file:///data.jsonl"}
  training: {learningRate: 2e-4}
  output: {uri: "file:///out"}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return to_file


def test_scientific_notation_is_a_number_as_kubectl_reads_it(write: Callable[[str], Path]) -> None:
    assert load_manifest(write(JOB)).spec.training.learning_rate == 2e-4


def test_other_objects_in_the_same_file_are_passed_over(write: Callable[[str], Path]) -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n---"
    assert load_manifest(write(secret + JOB)).metadata.name == "small"


@pytest.mark.parametrize(("text", "count"), [("{}", 0), (JOB + "---" + JOB, 2)], ids=["none", "two"])
def test_exactly_one_job_is_wanted(write: Callable[[str], Path], text: str, count: int) -> None:
    with pytest.raises(ManifestError, match=f"holds {count} QLoRAJob manifests"):
        load_manifest(write(text))


def test_a_kind_that_is_spelt_otherwise_is_shown(write: Callable[[str], Path]) -> None:
    with pytest.raises(ManifestError, match="holds 0 QLoRAJob manifests, but QloraJob; it must hold exactly one"):
        load_manifest(write(JOB.replace("QLoRAJob", "QloraJob")))


def test_what_is_no_yaml_is_said_with_its_line(write: Callable[[str], Path]) -> None:
    with pytest.raises(ManifestError, match="line 2"):
        load_manifest(write("kind: QLoRAJob\n  bad: ["))


def test_a_field_that_is_there_twice_is_said_with_its_line_and_no_advice(write: Callable[[str], Path]) -> None:
    with pytest.raises(ManifestError, match='duplicate key "kind"') as refused:
        load_manifest(write("kind: QLoRAJob\nkind: QLoRAJob\n"))
    assert "line 2" in str(refused.value)
    assert "http" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_manifest_says_itself_how_it_is_encoded(tmp_path: Path, encoding: str) -> None:
    """PowerShell's `>` writes UTF-16, Notepad a mark before UTF-8."""
    path = tmp_path / "job.yaml"
    path.write_bytes(JOB.encode(encoding))
    assert load_manifest(path).metadata.name == "small"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"kind: \xff\n", "not valid YAML"), (b"[" * 1000, "nested too deeply"), (b"kind: &a [*a]\n", "holds 0 QLoRAJob")],
    ids=["bytes", "depth", "loop"],
)
def test_what_is_no_manifest_at_all_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=says):
        load_manifest(path)


def test_every_problem_is_named(write: Callable[[str], Path]) -> None:
    with pytest.raises(ManifestError) as refused:
        load_manifest(write(JOB.replace("2e-4", "-1") + "  lora: {rank: 0}\n"))
    assert "spec.training.learningRate" in str(refused.value)
    assert "spec.lora.rank" in str(refused.value)
