"""What a user sees for every kind of mistake: a message that names the field, before any GPU pod is created."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import BUCKET, tiny_manifest, upload_large_model
from tests.support.live import Manifest, Namespace, write_s3_secret


@dataclass(frozen=True)
class Refused:
    """A manifest that `kubectl apply` refuses, and words of the message that the user reads."""

    name: str
    spec: Manifest
    says: tuple[str, ...]


AT_APPLY = (
    Refused("unknown-field", {"lora": {"rnak": 8}}, ('unknown field "spec.lora.rnak"',)),
    Refused("wrong-type", {"lora": {"rank": "sixteen"}}, ("spec.lora.rank", "integer")),
    Refused("negative-rank", {"lora": {"rank": -1}}, ("spec.lora.rank", "greater than or equal to 1")),
    Refused("steps-and-epochs", {"training": {"epochs": 1}}, ("training.epochs or training.maxSteps, not both",)),
    Refused("no-output", {"output": None}, ("spec.output", "Required")),
    Refused("bad-model-uri", {"model": {"uri": "llama"}}, ("spec.model.uri", "hf://organisation/name")),
    Refused("file-output", {"output": {"uri": "file:///tmp/x"}}, ("spec.output.uri", "s3://bucket/prefix")),
    Refused("unknown-optimizer", {"training": {"optimizer": "lion"}}, ("spec.training.optimizer", "adamw_torch")),
    Refused("bad-target-modules", {"lora": {"targetModules": "q_proj"}}, ("spec.lora.targetModules",)),
    Refused("uneven-batch", {"training": {"microBatchSize": 3}}, ("globalBatchSize must be a multiple",)),
    Refused("packed-groups", {"training": {"groupByLength": True}}, ("groupByLength", "packing: false")),
    Refused("bad-quantity", {"resources": {"memory": "lots"}}, ("resources.memory", "16Gi")),
    Refused("gate-alone", {"evaluation": {"gate": {}}}, ("evaluation.gate", "set dataset.validation")),
    Refused("gguf-alone", {"merge": {"gguf": {}}}, ("merge.gguf needs merge.enabled",)),
    Refused("two-validations", {"dataset": {"validation": {"fraction": 0.1, "split": "t"}}}, ("either fraction",)),
    Refused("gpus-on-cpu", {"resources": {"gpus": 2}}, ("gpuClass cpu takes no GPU",)),
    Refused("endpoint-with-password", {"output": {"endpoint": "http://me:pw@s3"}}, ("output.endpoint", "credentials")),
)


@pytest.mark.parametrize("case", AT_APPLY, ids=lambda case: case.name)
def test_kubectl_apply_refuses(namespace: Namespace, case: Refused) -> None:
    manifest = tiny_manifest(namespace, case.name, case.spec)
    answer = namespace.cluster.try_kubectl("-n", namespace.name, "apply", "-f", "-", input_text=json.dumps(manifest))
    assert answer.returncode != 0
    assert [word for word in case.says if word not in answer.stderr] == [], answer.stderr


def test_kubectl_apply_refuses_a_name_that_is_no_label(namespace: Namespace) -> None:
    manifest = tiny_manifest(namespace, "n" * 64)
    answer = namespace.cluster.try_kubectl("-n", namespace.name, "apply", "-f", "-", input_text=json.dumps(manifest))
    assert "metadata.name" in answer.stderr
    assert "63" in answer.stderr


@dataclass(frozen=True)
class Stalled:
    """A manifest that is well-formed, but wrong about the world."""

    name: str
    spec: Manifest
    reason: str
    says: tuple[str, ...]
    waiting: bool = False
    """The job goes on by itself once the missing thing is there, so it isn't Failed."""
    extra: Manifest = field(default_factory=dict)


ON_GPU = {"resources": {"gpuClass": "auto"}}
IN_THE_CLUSTER = (
    Stalled(
        "no-such-module",
        {"lora": {"targetModules": ["q_proj", "query_key_value"]}},
        "TargetModulesNotFound",
        ("spec.lora.targetModules", "query_key_value", "q_proj"),
    ),
    Stalled("no-rows-left", {"dataset": {"filter": {"kind": "prime"}}}, "DatasetEmpty", ("spec.dataset.filter",)),
    Stalled(
        "no-such-column",
        {"dataset": {"format": "instruction", "columns": {"output": "answer"}}},
        "ColumnMissing",
        ("spec.dataset.columns.output", "answer", "instruction"),
    ),
    Stalled(
        "no-such-dataset", {"dataset": {"uri": f"s3://{BUCKET}/nothing"}}, "DatasetNotFound", ("spec.dataset.uri",)
    ),
    Stalled("broken-row", {"dataset": {"uri": f"s3://{BUCKET}/broken"}}, "DatasetInvalid", ("rows.jsonl", "2")),
    Stalled("bad-template", {"dataset": {"template": "{{ nothing }}"}}, "TemplateInvalid", ("spec.dataset.template",)),
    Stalled("no-such-model", {"model": {"uri": f"s3://{BUCKET}/nothing"}}, "ModelNotFound", ("spec.model.uri",)),
    Stalled(
        "remote-code",
        {"model": {"uri": f"s3://{BUCKET}/remote-model"}},
        "RemoteCodeRefused",
        ("spec.model.trustRemoteCode",),
    ),
    Stalled(
        "remote-code-forbidden",
        {"model": {"uri": f"s3://{BUCKET}/remote-model", "trustRemoteCode": True}},
        "RemoteCodeRefused",
        ("spec.model.trustRemoteCode", "allowRemoteCode"),
    ),
    Stalled("no-such-bucket", {"output": {"uri": "s3://no-such-bucket/x"}}, "BucketNotFound", ("spec.output.uri",)),
    Stalled(
        "wrong-credentials",
        {"output": {"credentialsSecretRef": {"name": "wrong-credentials"}}},
        "AccessDenied",
        ("spec.output.credentialsSecretRef",),
    ),
    Stalled(
        "no-such-secret",
        {"output": {"credentialsSecretRef": {"name": "no-such-secret"}}},
        "SecretNotFound",
        ("spec.output.credentialsSecretRef", "no-such-secret"),
        waiting=True,
    ),
    Stalled(
        "no-such-claim", {"model": {"uri": "pvc://no-such-claim/x"}}, "ClaimNotFound", ("no-such-claim",), waiting=True
    ),
    Stalled(
        "unreachable-endpoint",
        {"output": {"endpoint": "http://127.0.0.1:9"}, "backoffLimit": 0},
        "EndpointUnreachable",
        ("spec.output.endpoint", "127.0.0.1:9"),
    ),
    Stalled(
        "too-big", {"model": {"uri": f"s3://{BUCKET}/huge-model"}, **ON_GPU}, "DoesNotFit", ("GB", "L4"), waiting=True
    ),
    Stalled(
        "no-such-class",
        {"resources": {"gpuClass": "Voodoo2"}},
        "Unsupported",
        ("spec.resources.gpuClass", "L4"),
        waiting=True,
    ),
    Stalled("no-unsloth", {"training": {"backend": "unsloth"}}, "Unsupported", ("spec.training.backend",)),
)


@pytest.fixture(scope="module")
def applied(namespace: Namespace, s3: Any, tiny_inputs: Path) -> Namespace:
    """All the wrong manifests at once: the cluster works on them side by side."""
    config = json.loads((tiny_inputs / "config.json").read_text())
    huge = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 160}
    upload_large_model(s3, tiny_inputs, "huge-model", huge)
    remote = config | {"model_type": "homemade", "auto_map": {"AutoConfig": "configuration_homemade.HomemadeConfig"}}
    for file in tiny_inputs.iterdir():
        if file.name != "config.json":
            s3.upload_file(str(file), BUCKET, f"remote-model/{file.name}")
    s3.put_object(Bucket=BUCKET, Key="remote-model/config.json", Body=json.dumps(remote).encode())
    s3.put_object(
        Bucket=BUCKET, Key="broken/rows.jsonl", Body=b'{"instruction": "a", "output": "b"}\n{"instruction":\n'
    )
    write_s3_secret(namespace, "wrong-credentials", AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="wrong")
    for case in IN_THE_CLUSTER:
        namespace.apply(tiny_manifest(namespace, case.name, case.spec))
    return namespace


@pytest.mark.parametrize("case", IN_THE_CLUSTER, ids=lambda case: case.name)
def test_the_job_is_stalled_and_says_why(applied: Namespace, case: Stalled) -> None:
    applied.wait(case.name, "Stalled", seconds=420)
    condition = applied.condition(case.name, "Stalled")
    assert condition is not None
    assert condition["reason"] == case.reason, condition["message"]
    assert [word for word in case.says if word not in condition["message"]] == [], condition["message"]
    assert applied.jobs(case.name, "train") == []
    if not case.waiting:
        assert (applied.condition(case.name, "Failed") or {}).get("status") == "True"
        assert applied.status(case.name)["phase"] == "Failed"


def test_a_job_that_waited_for_its_secret_goes_on_when_it_appears(applied: Namespace) -> None:
    applied.wait("no-such-secret", "Stalled")
    write_s3_secret(applied, "no-such-secret")
    applied.wait("no-such-secret", "Complete")
    assert (applied.condition("no-such-secret", "Stalled") or {"status": "False"})["status"] == "False"
