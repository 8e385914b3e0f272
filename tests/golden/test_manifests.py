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
from qlora_operator.manifests import claim_template, merge_job, prepare_job, train_job
from qlora_vram.calibration import Calibration
from qlora_vram.gpus import GpuClass
from qlora_vram.planner import plan
from qlorajob.identity import prepare_key
from qlorajob.plan import Plan
from qlorajob.resource import QLoRAJob, parse
from tests.support import gpus
from tests.support.gpus import fleet
from tests.support.reports import LLAMA_7B, TINY, prepared

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in (HERE / "cases").glob("*.yaml"))
FLEETS = {
    "mig": fleet(gpus.mig_mixed("a", "NVIDIA-A100-SXM4-80GB", {"3g.40gb": (40192, 2)}, gpus=0, pool="training")),
    "dra": fleet(gpus.resource_slice("a", gpus.device("gpu-0", "NVIDIA H100 80GB HBM3", 81559, "9.0"))),
    "memory": fleet(values=(GpuClass(name="homemade", memory_mib=32000, cost=1),)),
}
"""What the cluster of a case has; the shipped table stands in for the others."""
CALIBRATION = Calibration(context_bytes=10**9, slack_share=0.05)
"""Not the shipped one: a new fit changes no manifest."""
CONFIG = OperatorConfig(trainer_image="registry/trainer:1", image_pull_secrets=("registry",))


def load(case: str) -> QLoRAJob:
    return parse(json.loads(json.dumps(YAML(typ="safe").load(HERE / "cases" / f"{case}.yaml"))))


def jobs(case: str) -> list[dict[str, Any]]:
    """The Jobs of all three steps, merge where it is wanted."""
    job, there = load(case), FLEETS.get(case, Fleet())
    facts = TINY if job.spec.resources.gpu_class == "cpu" else LLAMA_7B
    found = prepared(prepare_key(job.spec), "0123456789abcdef", facts=facts)
    planned = plan(job.spec, facts, there.classes(job.spec.resources), calibration=CALIBRATION)
    assert isinstance(planned, Plan)
    slot = there.slot(planned.gpu_class, planned.gpus, job.spec.resources)
    made = [prepare_job(job, 1, CONFIG), train_job(job, found, planned, 1, CONFIG, slot)]
    return made + ([merge_job(job, found, 1, CONFIG)] if job.spec.merge.enabled else [])


def template(case: str) -> dict[str, Any] | None:
    job = load(case)
    return claim_template(job, FLEETS[case].slot(job.spec.resources.gpu_class, 1, job.spec.resources))


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
    assert_recorded(HERE / f"{case}.jobs.yaml", jobs(case))


def test_the_claim_template_is_as_recorded() -> None:
    made = template("dra")
    assert made
    assert_recorded(HERE / "dra.template.yaml", [made])


def assert_recorded(path: Path, documents: list[dict[str, Any]]) -> None:
    rendered = render(documents)
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


def test_a_slice_is_asked_for_by_its_own_resource() -> None:
    limits = [item["resources"]["limits"] for item in containers("mig")]
    assert [set(limit) - {"memory", "ephemeral-storage"} for limit in limits] == [set(), {"nvidia.com/mig-3g.40gb"}]


def test_a_claimed_gpu_is_asked_for_by_a_template_that_is_there() -> None:
    train = jobs("dra")[1]["spec"]["template"]["spec"]
    made = template("dra")
    assert made
    assert train["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": made["metadata"]["name"]}]
    assert train["containers"][0]["resources"]["claims"] == [{"name": "gpus"}]
    assert "affinity" not in train
    assert not any("nvidia.com" in key for key in train["containers"][0]["resources"]["limits"])
    assert made["spec"]["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] == "gpu.nvidia.com"


def test_a_class_without_labels_is_found_by_its_memory() -> None:
    affinity = jobs("memory")[1]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(found["key"], found["operator"], found["values"]) for found in term["matchExpressions"]] == [
        ("nvidia.com/gpu.memory", "Gt", ["31999"]),
        ("nvidia.com/gpu.memory", "Lt", ["33601"]),
    ]


def test_the_users_tolerations_and_selector_are_beside_the_plans() -> None:
    pod = jobs("mig")[1]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "training"}
    assert [toleration["key"] for toleration in pod["tolerations"]] == [
        *("dedicated", "nvidia.com/gpu", "nvidia.com/mig-3g.40gb")
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
