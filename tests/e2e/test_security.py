"""What the operator and its pods may do, tried on the real API server with the operator's own ServiceAccount."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import tiny_manifest
from tests.support import gpus
from tests.support.live import Cluster, Namespace, eventually
from tests.support.nodes import Simulation
from tests.support.prometheus import query

SERVICE_ACCOUNT = "system:serviceaccount:qlora-system:qlora-operator"


@pytest.fixture(scope="module")
def rules(cluster: Cluster) -> list[dict[str, Any]]:
    """What the operator's ClusterRole and its Role for the Lease grant."""
    role: dict[str, Any] = json.loads(cluster.kubectl("get", "clusterrole", "qlora-operator", "-o", "json"))
    lease = json.loads(cluster.kubectl("-n", "qlora-system", "get", "role", "qlora-operator-lease", "-o", "json"))
    granted: list[dict[str, Any]] = role["rules"] + lease["rules"]
    return granted


def _may(cluster: Cluster, *question: str) -> bool:
    answer = cluster.try_kubectl("auth", "can-i", *question, f"--as={SERVICE_ACCOUNT}")
    return answer.stdout.strip() == "yes"


@pytest.mark.parametrize("verb", ["get", "list", "watch"])
def test_the_operator_cannot_read_secrets(cluster: Cluster, verb: str) -> None:
    assert not _may(cluster, verb, "secrets", "--all-namespaces")
    assert not _may(cluster, verb, "secrets", "-n", "qlora-system")


def test_the_question_itself_can_be_answered_with_yes(cluster: Cluster) -> None:
    assert _may(cluster, "create", "jobs.batch", "--all-namespaces")


def test_no_rule_of_the_operator_has_a_wildcard(rules: list[dict[str, Any]]) -> None:
    assert rules
    assert [rule for rule in rules if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]] == []


@pytest.mark.parametrize("namespace", ["default", "qlora-system", "qlora-dev"])
def test_the_namespaces_enforce_the_restricted_standard(cluster: Cluster, namespace: str) -> None:
    labels = json.loads(cluster.kubectl("get", "namespace", namespace, "-o", "json"))["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_operator_runs_as_a_pod_under_its_own_service_account(cluster: Cluster) -> None:
    pods = json.loads(cluster.kubectl("-n", "qlora-system", "get", "pods", "-o", "json"))["items"]
    running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
    assert [pod["spec"]["serviceAccountName"] for pod in running] == ["qlora-operator"]


def test_the_operator_uses_every_verb_it_has(
    cluster: Cluster, namespace: Namespace, rules: list[dict[str, Any]], tiny_inputs: Path
) -> None:
    """Held against the API server's audit log, after a job that waits (its events are read) and is then replaced, and
    one that claims a GPU."""
    namespace.apply(tiny_manifest(namespace, "waiting", {"dataset": {"uri": "configmap://no-such-map/rows.jsonl"}}))
    namespace.wait("waiting", "Stalled")
    namespace.apply(tiny_manifest(namespace, "waiting", {"dataset": {"uri": "configmap://another-map/rows.jsonl"}}))
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    device = gpus.device("gpu-0", "NVIDIA Imagined 16GB", 16384, "8.0")
    with Simulation(cluster) as simulated:
        simulated.add(gpus.resource_slice("no-such-node", device))
        namespace.apply(tiny_manifest(namespace, "claims", {"resources": {"gpuClass": "Imagined-16GB"}}))
        namespace.wait_for("claims", "{.status.phase}=Queued")
        namespace.kubectl("delete", "qlj", "claims")
    eventually(lambda: granted <= audited_verbs(cluster), 60, f"every one of {granted} was used")


def audited_verbs(cluster: Cluster) -> set[tuple[str, str]]:
    """(resource, verb) of every request by the operator since the cluster started, from the API server's audit log."""
    used = set()
    with (cluster.layout.logs / "audit.log").open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                continue  # the API server is still writing it
            event = json.loads(line)
            reference = event.get("objectRef")  # none for /version and its like
            if event["user"]["username"] == SERVICE_ACCOUNT and reference:
                resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
                used.add((resource, event["verb"]))
    return used


def test_prometheus_scrapes_the_operator(cluster: Cluster) -> None:
    eventually(lambda: 1.0 in query('up{namespace="qlora-system"}').values(), 30, "the operator is scraped")
    assert query("qlora_reconcile_seconds_count")
