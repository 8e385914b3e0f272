"""What the chart renders, with the real helm: values are checked, the operator understands its configuration."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from ruamel.yaml import YAML

from cluster.shell import ClusterError
from qlora_operator.config import OperatorConfig
from tests.handlers.stage import REPOSITORY
from tests.support.live import Cluster

CLAIMS, NO_CLAIMS = "discovery.dynamicResources=true", "discovery.dynamicResources=false"
CHART = str(REPOSITORY / "charts" / "qlora-operator")


def render(cluster: Cluster, *values: str) -> list[dict[str, Any]]:
    options = [argument for value in values for argument in ("--set-json", value)]
    text = cluster.target.helm("template", "qlora-operator", CHART, "--kube-version", "1.36.0", *options)
    return [json.loads(json.dumps(found)) for found in YAML(typ="safe").load_all(text) if found]


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [found for found in objects if found["kind"] == kind]


def configuration(objects: list[dict[str, Any]]) -> OperatorConfig:
    (text,) = [found["data"]["config.yaml"] for found in of_kind(objects, "ConfigMap") if "data" in found]
    return OperatorConfig.model_validate(YAML(typ="safe").load(io.StringIO(text)))


def test_the_default_values_are_the_operators_defaults(cluster: Cluster) -> None:
    assert configuration(render(cluster)) == OperatorConfig()


def test_values_reach_the_operator(cluster: Cluster) -> None:
    config = configuration(
        render(
            cluster,
            "allowRemoteCode=true",
            'gpuClasses=[{"name":"mine","memoryMiB":24000,"computeCapability":7.5}]',
            'trainer.extraEnv=[{"name":"HF_ENDPOINT","value":"http://mirror"}]',
            'trainer.image={"repository":"r/t","tag":"2"}',
        )
    )
    assert config.allow_remote_code
    assert config.gpu_classes[0].name == "mine"
    assert config.extra_env[0]["name"] == "HF_ENDPOINT"
    assert config.trainer_image == "r/t:2"


@pytest.mark.parametrize(
    "value",
    [
        "unknown=1",
        'trainer.extraEnv="x"',
        'gpuClasses=[{"name":"auto","memoryMiB":24000}]',
        "image.tagg=1",
        'watchNamespaces=["a","a"]',
        'watchNamespaces=["team-*"]',
    ],
)
def test_wrong_values_are_refused(cluster: Cluster, value: str) -> None:
    with pytest.raises(ClusterError, match="schema"):
        render(cluster, value)


def test_the_operator_may_do_this_and_no_more(cluster: Cluster) -> None:
    objects = render(cluster, NO_CLAIMS)
    role = next(r for r in of_kind(objects, "ClusterRole") if r["metadata"]["name"] == "qlora-operator")
    granted = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert granted == {
        ("qlorajobs", "list"),
        ("qlorajobs", "watch"),
        ("qlorajobs/status", "patch"),
        ("jobs", "list"),
        ("jobs", "watch"),
        ("jobs", "create"),
        ("jobs", "delete"),
        ("pods", "list"),
        ("pods", "watch"),
        ("events", "create"),
        ("events", "list"),
        ("nodes", "list"),
        ("nodes", "watch"),
    }


def test_an_operator_that_claims_gpus_may_do_this_too(cluster: Cluster) -> None:
    role = next(r for r in of_kind(render(cluster, CLAIMS), "ClusterRole") if r["metadata"]["name"] == "qlora-operator")
    rules = [rule for rule in role["rules"] if rule["apiGroups"] == ["resource.k8s.io"]]
    assert {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]} == {
        ("resourceclaimtemplates", "create"),
        ("resourceslices", "list"),
        ("resourceslices", "watch"),
    }


def test_an_operator_of_some_namespaces_looks_at_nodes_and_nothing_else_outside(cluster: Cluster) -> None:
    objects = render(cluster, 'watchNamespaces=["a","b"]', "aggregateRoles=false", NO_CLAIMS)
    (role,) = of_kind(objects, "ClusterRole")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]}]


def test_what_the_operator_may_not_look_at_it_does_not_watch(cluster: Cluster) -> None:
    def modules(*values: str) -> list[str]:
        (deployment,) = of_kind(render(cluster, *values), "Deployment")
        arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
        return [argument for argument in arguments if argument.startswith("--module")]

    nodes, slices = "--module=qlora_operator.node_handlers", "--module=qlora_operator.slice_handlers"
    assert modules(CLAIMS) == [nodes, slices]
    assert modules(NO_CLAIMS) == [nodes]
    assert modules(NO_CLAIMS, "discovery.nodes=false") == []


def test_an_operator_of_some_namespaces_that_reads_no_nodes_gets_no_cluster_role(cluster: Cluster) -> None:
    off = ("aggregateRoles=false", "discovery.nodes=false", NO_CLAIMS)
    objects = render(cluster, 'watchNamespaces=["a","b"]', *off)
    assert of_kind(objects, "ClusterRole") == []
    roles = [role["metadata"] for role in of_kind(objects, "Role")]
    assert [role.get("namespace") for role in roles if role["name"] == "qlora-operator"] == ["a", "b"]
    arguments = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--namespace=a", "--namespace=b"} <= set(arguments)
    assert "--all-namespaces" not in arguments


def test_operators_of_some_namespaces_stand_side_by_side(cluster: Cluster) -> None:
    """Helm refuses an object that another release has made."""

    def outside(namespace: str) -> set[str]:
        values = ("--namespace", namespace, "--set-json", f'watchNamespaces=["{namespace}"]')
        text = cluster.target.helm("template", "qlora-operator", CHART, "--kube-version", "1.36.0", *values)
        objects = [found for found in YAML(typ="safe").load_all(text) if found]
        return {found["metadata"]["name"] for found in objects if found["kind"].startswith("ClusterRole")}

    assert outside("team-a")
    assert not outside("team-a") & outside("team-b")


def test_what_runs_took_is_kept_in_one_config_map_that_upgrades_leave_alone(cluster: Cluster) -> None:
    objects = render(cluster)
    (kept,) = [found for found in of_kind(objects, "ConfigMap") if found["metadata"]["name"] == "qlora-observations"]
    assert set(kept) == {"apiVersion", "kind", "metadata"}  # with data, helm would put that back
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (role,) = [role for role in of_kind(objects, "Role") if role["metadata"]["name"].endswith("-observations")]
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "patch"]}
    assert role["rules"] == [rule | {"resourceNames": ["qlora-observations"]}]
    (binding,) = [
        binding for binding in of_kind(objects, "RoleBinding") if binding["roleRef"]["name"] == role["metadata"]["name"]
    ]
    assert binding["subjects"][0]["name"] == "qlora-operator"


def test_an_operator_that_is_not_to_learn_has_no_config_map_and_no_right_to_one(cluster: Cluster) -> None:
    objects = render(cluster, "learning.enabled=false")
    assert [role["metadata"]["name"] for role in of_kind(objects, "Role")] == ["qlora-operator-lease"]
    assert "qlora-observations" not in {found["metadata"]["name"] for found in objects}
    assert not configuration(objects).learning
    assert configuration(render(cluster)).learning


def test_operators_agree_on_one_lease_and_have_no_right_to_another(cluster: Cluster) -> None:
    objects = render(cluster, "replicaCount=2", "leaderElection.leaseDurationSeconds=30")
    spec = of_kind(objects, "Deployment")[0]["spec"]
    assert spec["replicas"] == 2
    env = {entry["name"]: entry for entry in spec["template"]["spec"]["containers"][0]["env"]}
    (role,) = [role for role in of_kind(objects, "Role") if role["metadata"]["name"].endswith("-lease")]
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    assert role["rules"] == [
        leases | {"resourceNames": [env["QLORA_LEASE"]["value"]], "verbs": ["get", "patch"]},
        leases | {"verbs": ["create"]},
    ]
    paths = {name: env[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in ("QLORA_NAMESPACE", "QLORA_POD")}
    assert paths == {"QLORA_NAMESPACE": "metadata.namespace", "QLORA_POD": "metadata.name"}
    assert configuration(objects).lease_duration_seconds == 30


def test_monitors_are_there_on_request(cluster: Cluster) -> None:
    objects = render(cluster, "monitoring.podMonitor.enabled=true", "monitoring.serviceMonitor.enabled=true")
    assert of_kind(objects, "PodMonitor")
    assert of_kind(objects, "ServiceMonitor")
    assert not of_kind(render(cluster), "PodMonitor")
