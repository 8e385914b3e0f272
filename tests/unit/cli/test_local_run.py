"""`qlora run`: the same manifest without a cluster, on local files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import weights
from qlorajob.manifest import ArtifactManifest
from tests.support import tiny

QLORA = Path(sys.executable).with_name("qlora")


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose model, data and output are local files."""
    root = tmp_path_factory.mktemp("local")
    tiny.write_model(root / "model", weights.ensure())
    (root / "data.jsonl").write_bytes(tiny.jsonl())
    job = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "local"},
        "spec": {
            "model": {"uri": f"file://{root}/model"},
            "dataset": {"uri": f"file://{root}/data.jsonl"},
            "lora": {"rank": 4},
            "training": {"maxSteps": 3, "globalBatchSize": 2, "maxSequenceLength": 64, "loggingSteps": 1},
            "resources": {"gpuClass": "cpu"},
            "output": {"uri": f"file://{root}/out"},
            "merge": {"enabled": True},
        },
    }
    YAML().dump(job, root / "job.yaml")
    return root / "job.yaml"


def _run(manifest: Path) -> subprocess.CompletedProcess[str]:
    command = [str(QLORA), "run", str(manifest), "--work-dir", str(manifest.parent / "work")]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def done(job_file: Path) -> subprocess.CompletedProcess[str]:
    return _run(job_file)


def test_it_leaves_adapter_and_merged_model_with_a_manifest_that_holds(
    job_file: Path, done: subprocess.CompletedProcess[str]
) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest_path,) = (job_file.parent / "out").glob("*/manifest.json")
    manifest = ArtifactManifest.model_validate_json(manifest_path.read_bytes())
    assert manifest.files
    for file in manifest.files:
        assert hashlib.sha256((manifest_path.parent / file.path).read_bytes()).hexdigest() == file.sha256
    assert {file.path.split("/")[0] for file in manifest.files} == {
        *("adapter", "merged", "tensorboard", "report.json", "report.html")
    }


def test_a_second_run_finds_the_first_and_trains_nothing(
    job_file: Path, done: subprocess.CompletedProcess[str]
) -> None:
    assert done.returncode == 0
    log = job_file.parent / "work" / "local" / "train.log"
    before = log.stat().st_mtime_ns
    again = _run(job_file)
    assert again.returncode == 0
    assert "adapter" in again.stdout
    assert log.stat().st_mtime_ns == before


def test_a_wrong_manifest_is_refused_with_every_problem_named(tmp_path: Path, job_file: Path) -> None:
    job = YAML(typ="safe", pure=True).load(job_file)
    job["spec"]["lora"]["rank"] = -1
    job["spec"]["training"]["epochs"] = 2
    YAML().dump(job, tmp_path / "bad.yaml")
    answer = _run(tmp_path / "bad.yaml")
    assert answer.returncode == 64
    assert "spec.lora.rank" in answer.stderr
    assert "training.epochs or training.maxSteps, not both" in answer.stderr


def test_a_source_that_only_a_cluster_has_is_refused(tmp_path: Path, job_file: Path) -> None:
    job = YAML(typ="safe", pure=True).load(job_file)
    job["spec"]["dataset"]["uri"] = "configmap://data/rows.jsonl"
    YAML().dump(job, tmp_path / "cluster.yaml")
    answer = _run(tmp_path / "cluster.yaml")
    assert answer.returncode == 64
    assert "spec.dataset.uri" in answer.stderr


def test_a_missing_column_is_named_and_nothing_is_written(tmp_path: Path, job_file: Path) -> None:
    job = YAML(typ="safe", pure=True).load(job_file)
    job["spec"]["dataset"]["columns"] = {"output": "answer"}
    job["spec"]["output"]["uri"] = f"file://{tmp_path}/out"
    YAML().dump(job, tmp_path / "column.yaml")
    answer = _run(tmp_path / "column.yaml")
    assert answer.returncode == 64
    assert "spec.dataset.columns.output" in answer.stderr
    assert json.loads((tmp_path / "work" / "local" / "prepare-report.json").read_text())["reason"] == "ColumnMissing"
    assert list(tmp_path.glob("out/*/manifest.json")) == []
