"""The stage for handler tests: a namespace of its own, the chart's rights, and the operator as a process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.standalone import control_plane
from demo.target import Target
from qlora_operator.experience import CONFIG_MAP
from tests.handlers.stage import CLAIM, REPOSITORY, OperatorProcess, Stage
from tests.support.live import Cluster, eventually

CHART = REPOSITORY / "charts" / "qlora-operator"
RELEASE = "handlers"
CONFIG = {
    "leaseDurationSeconds": 6,
    "trainerImage": "qlora/none:none",
    "imagePullPolicy": "Never",
    "extraVolumes": [{"name": "never", "persistentVolumeClaim": {"claimName": CLAIM}}],
    "progressIntervalSeconds": 0.5,
}


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane of these tests' own, without nodes, operator or S3; the local cluster isn't touched."""
    with control_plane(tmp_path_factory.mktemp("control-plane")) as layout:
        nothing = {"endpoint": "", "host_endpoint": "", "trainer_image": ""}
        made = Cluster(Target(layout, layout.kubeconfig, operator_image=None, credentials={}, **nothing))
        made.kubectl("apply", "--server-side", "-f", str(CHART / "crds"))
        yield made


@pytest.fixture(scope="module")
def stage(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A running operator in a namespace where pods never get a node."""
    name = request.module.__name__.rpartition(".")[2].replace("_", "-")
    directory = tmp_path_factory.mktemp("operator")
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("-n", name, "apply", "-f", "-", input_text=json.dumps(_claim()))
    config = directory / "config.yaml"
    config.write_text(json.dumps(CONFIG))
    operator = OperatorProcess(name, _kubeconfig(cluster, name, directory), config, directory / "operator.log")
    if getattr(request.module, "STARTS_OPERATOR", True):
        operator.start()
    yield Stage(cluster, name, operator)
    operator.stop()


def _claim() -> dict[str, object]:
    spec = {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": "no-such-volume"}
    resources = {"requests": {"storage": "1Gi"}}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM},
        "spec": spec | {"resources": resources},
    }


def _kubeconfig(cluster: Cluster, namespace: str, directory: Path) -> Path:
    """A kubeconfig of the chart's ServiceAccount, with the chart's Roles in that namespace and no other right."""
    rendered = cluster.target.helm(
        *("template", RELEASE, str(CHART), "--namespace", namespace, "--kube-version", "1.36.0"),
        *("--set", "discovery.dynamicResources=true"),
        *("--set", f"watchNamespaces={{{namespace}}}", "--show-only", "templates/rbac.yaml"),
        *("--show-only", "templates/observations.yaml", "--show-only", "templates/lease.yaml"),
    )
    cluster.kubectl("-n", namespace, "apply", "-f", "-", input_text=rendered)
    account = f"{RELEASE}-qlora-operator"
    token = cluster.kubectl("-n", namespace, "create", "token", account, "--duration=4h").strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = directory / "kubeconfig"
    path.write_text(json.dumps(config))
    lease = ("get", f"leases.coordination.k8s.io/{account}")
    granted = (("list", "qlorajobs.qlora.dev"), ("get", f"configmaps/{CONFIG_MAP}"), lease)
    eventually(lambda: all(_may(cluster, namespace, account, *each) for each in granted), 10, "the Roles are in force")
    return path


def _may(cluster: Cluster, namespace: str, account: str, verb: str, resource: str) -> bool:
    question = ("auth", "can-i", verb, resource, "-n", namespace)
    who = f"--as=system:serviceaccount:{namespace}:{account}"
    return cluster.try_kubectl(*question, who).stdout.strip() == "yes"
