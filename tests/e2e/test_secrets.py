"""Credentials are seen nowhere: marked ones go through a job that succeeds and one that fails, then all is searched."""

from __future__ import annotations

import base64
import json
import secrets
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.layout import PROMETHEUS_PORT
from demo.verify import list_keys
from qlorajob.names import METRICS_PORT
from tests.e2e.conftest import BUCKET, tiny_manifest
from tests.support.identities import Identity, identity
from tests.support.live import Manifest, Namespace, eventually, write_s3_secret

TOKEN = f"hf_{secrets.token_hex(17)}"
KINDS = "events,qlorajobs,configmaps,jobs,pods,resourceclaims"


UNKNOWN = Identity(f"unknown-{secrets.token_hex(8)}", secrets.token_hex(20))
"""Of nobody: the server's own answer holds the key's id."""


@pytest.fixture(scope="module")
def known(namespace: Namespace, s3: Any, tiny_inputs: Path) -> Identity:
    """The credentials of the job that succeeds. The one that fails runs beside it."""
    keys = identity(namespace.cluster, "marked")
    namespace.apply(_job(namespace, "good", keys))
    namespace.apply(_job(namespace, "bad", UNKNOWN))
    return keys


def test_credentials_of_a_job_that_succeeds_are_seen_nowhere(namespace: Namespace, known: Identity, s3: Any) -> None:
    namespace.wait_for("good", "{.status.phase}=Training")
    trainer = eventually(lambda: _metrics(namespace, "good"), 120, "the trainer's metrics")
    assert "qlora_train" in trainer
    namespace.wait("good", "Complete")
    said = dict(_everything(namespace, s3, "good"), trainer=trainer)
    assert {"prepare", "train", "merge"} <= {name.partition(" ")[0] for name in said}
    assert _found(said, known) == []


def test_credentials_of_a_job_that_fails_are_seen_nowhere(namespace: Namespace, known: Identity, s3: Any) -> None:
    status = namespace.wait("bad", "Failed")
    assert "spec.output.credentialsSecretRef" in json.dumps(status["conditions"])
    assert _found(dict(_everything(namespace, s3, "bad")), UNKNOWN) == []


def test_the_search_finds_what_is_there(namespace: Namespace) -> None:
    keys = Identity("marked-access", "marked-secret")
    coded = base64.b64encode(b"marked-secret").decode()
    assert _found({"log": "x marked-access y", "argument": f"--key={coded}"}, keys) == [
        "log: access key",
        "argument: secret key in base64",
    ]


def _job(namespace: Namespace, name: str, keys: Identity) -> Manifest:
    write_s3_secret(namespace, name, **keys.values())
    write_s3_secret(namespace, f"{name}-hub", token=TOKEN)
    spec = {
        "model": {"tokenSecretRef": {"name": f"{name}-hub", "key": "token"}},
        "training": {"maxSteps": 20, "saveSteps": 10},
        "merge": {"enabled": True},
        "output": {"credentialsSecretRef": {"name": name}},
    }
    return tiny_manifest(namespace, name, spec)


def _metrics(namespace: Namespace, name: str) -> str:
    """What the running trainer exports; "" when it doesn't yet."""
    for pod in namespace.pods(name, "train"):
        try:
            with urllib.request.urlopen(f"http://{pod['status']['podIP']}:{METRICS_PORT}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, KeyError):
            continue
    return ""


def _everything(namespace: Namespace, s3: Any, name: str) -> Iterator[tuple[str, str]]:
    """Whatever the job has said anywhere: where → text."""
    for pod in namespace.pods(name):
        step = pod["metadata"]["labels"]["qlora.dev/step"]
        yield f"{step} log", namespace.kubectl("logs", pod["metadata"]["name"], "--all-containers")
    system = namespace.cluster.target.operator_namespace
    for previous in ("", "--previous"):
        logs = ("-n", system, "logs", "-l", "app.kubernetes.io/part-of=qlora-operator", "--tail=-1")
        yield f"operator log {previous}", namespace.cluster.try_kubectl(*logs, *filter(None, [previous])).stdout
    yield "objects", namespace.kubectl("get", KINDS, "-o", "json", "--show-managed-fields")
    yield "operator's objects", namespace.cluster.kubectl("-n", system, "get", "events,configmaps,pods", "-o", "json")
    yield "series", _series()
    for key, size in list_keys(s3, BUCKET, f"{namespace.name}/{name}/").items():
        if size < 1 << 20:
            content = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            yield key, content.decode(errors="replace")


def _series() -> str:
    """Every series of Prometheus: their labels hold all the text there is."""
    question = urllib.parse.urlencode({"match[]": '{__name__=~"qlora_.+"}'})
    with urllib.request.urlopen(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/series?{question}", timeout=30) as answer:
        return str(answer.read().decode())


def _found(said: dict[str, str], keys: Identity) -> list[str]:
    """Where a secret is, plain or in base64."""
    marked = {"access key": keys.access_key, "secret key": keys.secret_key, "hub token": TOKEN}
    coded = {f"{name} in base64": base64.b64encode(value.encode()).decode() for name, value in marked.items()}
    return [
        f"{where}: {name}" for where, text in said.items() for name, value in (marked | coded).items() if value in text
    ]
