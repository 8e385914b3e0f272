"""The stage for handler tests: a namespace of its own, the chart's rights, and the operator as a process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

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
def _no_other_operator(cluster: Cluster) -> Iterator[None]:
    """The installed operator serves all namespaces: it pauses while these tests run."""
    deployment = ("deployment/qlora-operator", "-n", "qlora-system")
    installed = cluster.try_kubectl("get", *deployment).returncode == 0
    if installed:
        cluster.kubectl("scale", *deployment, "--replicas=0")
        cluster.kubectl("wait", "pod", "-n", "qlora-system", "--all", "--for=delete", "--timeout=60s")
    yield
    if installed:
        cluster.kubectl("scale", *deployment, "--replicas=1")
        cluster.kubectl("rollout", "status", *deployment, "--timeout=120s")


@pytest.fixture(scope="module")
def stage(
    cluster: Cluster, _no_other_operator: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A running operator in a namespace where pods never get a node."""
    name = request.module.__name__.rpartition(".")[2].replace("_", "-")
    directory = tmp_path_factory.mktemp("operator")
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CHART / "crds"))
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait")
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("-n", name, "apply", "-f", "-", input_text=json.dumps(_claim()))
    config = directory / "config.yaml"
    config.write_text(json.dumps(CONFIG))
    operator = OperatorProcess(name, _kubeconfig(cluster, name, directory), config, directory / "operator.log")
    if getattr(request.module, "STARTS_OPERATOR", True):
        operator.start()
    yield Stage(cluster, name, operator)
    operator.stop()
    cluster.kubectl("-n", name, "delete", "qlj", "--all")  # else the installed operator tries to serve them
    for kind in ("clusterrole", "clusterrolebinding"):
        cluster.kubectl("delete", kind, f"{name}-{RELEASE}-qlora-operator")
    cluster.kubectl("delete", "namespace", name, "--wait=false")


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
