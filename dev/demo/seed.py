"""What the quickstart refers to: buckets, the model's weights, the instruction set, and the S3 credentials' Secret."""

from __future__ import annotations

import json
from typing import Any

import weights
from cluster.layout import DEV
from cluster.shell import run, step
from demo import dataset
from demo.target import Target

BUCKETS = ("models", "datasets", "adapters")
MODEL = "SmolLM2-135M-Instruct"
DATASET_KEY = "iso-639/languages.jsonl"
SECRET = "s3-credentials"  # noqa: S105 - the Secret's name


def seed(target: Target, python: str) -> None:
    """Put everything there that `examples/quickstart.yaml` refers to; what is there already stays."""
    s3 = target.s3()
    existing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in existing:
            s3.create_bucket(Bucket=bucket)
    _seed_model(s3, python)
    s3.put_object(Bucket="datasets", Key=DATASET_KEY, Body=dataset.jsonl())
    write_secret(target, target.namespace)


def _seed_model(s3: Any, python: str) -> None:
    folder = weights.default_destination()
    with step(f"weights of {MODEL}"):
        run([python, DEV / "weights.py", folder])
    present = {item["Key"] for item in s3.list_objects_v2(Bucket="models", Prefix=f"{MODEL}/").get("Contents", [])}
    for file in sorted(folder.iterdir()):
        key = f"{MODEL}/{file.name}"
        if file.is_file() and key not in present:
            s3.upload_file(str(file), "models", key)


def write_secret(target: Target, namespace: str, name: str = SECRET) -> None:
    """The S3 credentials as a Secret that jobs refer to. The values go through standard input, never an argument."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "stringData": target.credentials,
    }
    target.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input_text=json.dumps(secret))
