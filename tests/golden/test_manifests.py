"""Golden manifests: cases/<name>.yaml in, <name>.jobs.yaml out. QLORA_UPDATE_GOLDEN=1 rewrites what is recorded."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from qlora_operator.config import OperatorConfig
from qlora_operator.fleet import Fleet
from qlora_operator.manifests import merge_job, prepare_job, train_job
from qlora_operator.plan import plan
from qlorajob.identity import prepare_key
from qlorajob.plan import Plan
from qlorajob.resource import QLoRAJob, parse
from tests.support.reports import LLAMA_7B, TINY, prepared

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in (HERE / "cases").glob("*.yaml"))
CONFIG = OperatorConfig(trainer_image="registry/trainer:1", image_pull_secrets=("registry",))


def load(case: str) -> QLoRAJob:
    return parse(json.loads(json.dumps(YAML(typ="safe").load(HERE / "cases" / f"{case}.yaml"))))


def jobs(case: str) -> list[dict[str, Any]]:
    """The Jobs of all three steps, merge where it is wanted."""
    job = load(case)
    facts = TINY if job.spec.resources.gpu_class == "cpu" else LLAMA_7B
    found = prepared(prepare_key(job.spec), "0123456789abcdef", facts=facts)
    planned = plan(job.spec, facts)
    assert isinstance(planned, Plan)
    slot = Fleet().slot(planned.gpu_class, planned.gpus, job.spec.resources)
    made = [prepare_job(job, 1, CONFIG), train_job(job, found, planned, 1, CONFIG, slot)]
    return made + ([merge_job(job, found, 1, CONFIG)] if job.spec.merge.enabled else [])


def render(documents: list[dict[str, Any]]) -> str:
    yaml = YAML()
    yaml.width = 120
    yaml.explicit_start = True
    text = io.StringIO()
    yaml.dump_all([json.loads(json.dumps(document)) for document in documents], text)
    return text.getvalue()


def containers(case: str) -> list[dict[str, Any]]:
    return [job["spec"]["template"]["spec"]["containers"][0] for job in jobs(case)]


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_as_recorded(case: str) -> None:
    path = HERE / f"{case}.jobs.yaml"
    rendered = render(jobs(case))
    if os.environ.get("QLORA_UPDATE_GOLDEN"):
        path.write_text(rendered)
    assert rendered == path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_the_restricted_standard(case: str) -> None:
    for job in jobs(case):
        pod = job["spec"]["template"]["spec"]
        container = pod["containers"][0]["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["allowPrivilegeEscalation"] is False
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert container["readOnlyRootFilesystem"] is True
        assert pod["automountServiceAccountToken"] is False
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


@pytest.mark.parametrize("case", CASES)
def test_names_are_valid_and_stable(case: str) -> None:
    names = [job["metadata"]["name"] for job in jobs(case)]
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,56}[a-z0-9])?", name) for name in names)
    assert names == [job["metadata"]["name"] for job in jobs(case)]
    assert len(set(names)) == len(names)


def test_only_the_training_job_is_queued_and_held() -> None:
    held = [
        (job["spec"].get("suspend"), "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"])
        for job in jobs("everything")
    ]
    assert held == [(None, False), (True, True), (None, False)]


def test_only_the_training_pod_asks_for_a_gpu() -> None:
    assert ["nvidia.com/gpu" in item["resources"]["limits"] for item in containers("everything")] == [
        False,
        True,
        False,
    ]


def test_a_cpu_job_asks_for_no_gpu() -> None:
    assert not any("nvidia.com/gpu" in item["resources"]["limits"] for item in containers("cpu"))


def test_kubernetes_cannot_expand_what_users_write() -> None:
    for item in containers("everything"):
        value = item["env"][0]["value"]
        assert "$$(HOME)" in value
        assert "$(HOME)" not in value.replace("$$", "")


def test_no_secret_value_is_in_a_manifest() -> None:
    for item in containers("everything"):
        by_reference = {entry["name"] for entry in item["env"] if "valueFrom" in entry}
        assert by_reference == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"}


def test_finished_jobs_live_long_enough_to_be_read() -> None:
    assert {job["spec"]["ttlSecondsAfterFinished"] for job in jobs("everything")} == {60}
