"""What the end-to-end tests train on: a tiny model and a tiny dataset in the cluster's real S3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weights
from qlora_vram.facts import blueprint
from tests.support import tiny
from tests.support.live import Cluster, Manifest, Namespace, empty_bucket, merged

BUCKET = "e2e"


@pytest.fixture(scope="session")
def s3(cluster: Cluster) -> Any:
    """A boto3 client for the cluster's S3 server, with the bucket of these tests emptied."""
    return empty_bucket(cluster, BUCKET)


@pytest.fixture(scope="session")
def tiny_inputs(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """s3://e2e/tiny-model and s3://e2e/tiny-data; returns the model's local directory."""
    directory = tmp_path_factory.mktemp("tiny-model")
    tiny.write_model(directory, weights.default_destination())
    for file in directory.iterdir():
        s3.upload_file(str(file), BUCKET, f"tiny-model/{file.name}")
    s3.put_object(Bucket=BUCKET, Key="tiny-data/rows.jsonl", Body=tiny.jsonl())
    return directory


@pytest.fixture
def manifest(namespace: Namespace, tiny_inputs: Path) -> Callable[..., Manifest]:
    """A factory of small QLoRAJobs: `manifest("name", {"training": {"maxSteps": 2}})`."""
    return lambda name, spec=None: tiny_manifest(namespace, name, spec)


def tiny_manifest(namespace: Namespace, name: str, spec: Manifest | None = None) -> Manifest:
    """A QLoRAJob that trains in seconds; `spec` is merged over it."""
    base = {
        "model": {"uri": f"s3://{BUCKET}/tiny-model"},
        "dataset": {"uri": f"s3://{BUCKET}/tiny-data"},
        "lora": {"rank": 4},
        "training": {"maxSteps": 3, "globalBatchSize": 2, "maxSequenceLength": 64, "loggingSteps": 1},
        "resources": {"gpuClass": "cpu"},
        "output": {
            "uri": f"s3://{BUCKET}/{namespace.name}/{name}",
            "endpoint": namespace.cluster.target.endpoint,
            "credentialsSecretRef": {"name": "s3-credentials"},
        },
    }
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": merged(base, spec or {}),
    }


def upload_large_model(s3: Any, tiny_model: Path, prefix: str, changes: Manifest) -> None:
    """A model whose config.json is a tiny one's with changes. Its weights are there by name alone, in an index."""
    config = json.loads((tiny_model / "config.json").read_text()) | changes
    model = blueprint(config)
    assert model
    index = {"weight_map": {f"{path}.weight": "model-1.safetensors" for path in model.linear_paths()}}
    for file in tiny_model.iterdir():
        name = "model-1.safetensors" if file.suffix == ".safetensors" else file.name
        s3.upload_file(str(file), BUCKET, f"{prefix}/{name}")
    for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=json.dumps(content).encode())
