"""Nodes that aren't there: the scheduler binds pods to them, and the operator reads their labels.

A real node is Ready while its kubelet renews its lease; here a thread does. Each has the taint `gpus.SIMULATED`, so
that only pods of the tests that make them go there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Container, Iterable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from tests.support.gpus import Json
from tests.support.live import Cluster, eventually

RENEW_SECONDS = 10.0
LEASE_NAMESPACE = "kube-node-lease"


class Simulation:
    """Makes Nodes, ResourceSlices and DeviceClasses, and takes them away at the end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._made: list[Json] = []
        self._stopped = threading.Event()
        self._renewing = threading.Thread(target=self._renew_for_ever, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._renewing.join()
        self.remove(*self._made)

    def add(self, *objects: Json) -> None:
        """Create them; returns when the nodes among them are Ready and nothing but their own taints is on them."""
        for found in objects:
            self._made.append(found)
        nodes = [found for found in objects if found["kind"] == "Node"]
        self._renew([found["metadata"]["name"] for found in nodes])
        self._cluster.kubectl("create", "-f", "-", input_text=_list(objects))
        wanted = {found["metadata"]["name"]: found["spec"]["taints"] for found in nodes}
        eventually(lambda: self._taints(wanted) == wanted, 60, f"{list(wanted)} are ready")

    def remove(self, *objects: Json) -> None:
        """Delete them. Pods that are still on the nodes among them go, too: no kubelet would end them."""
        self._made = [made for made in self._made if made not in objects]
        gone = [found["metadata"]["name"] for found in objects if found["kind"] == "Node"]
        for pod in json.loads(self._cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]:
            if pod["spec"].get("nodeName") in gone:
                where = ("-n", pod["metadata"]["namespace"], pod["metadata"]["name"])
                self._cluster.kubectl("delete", "pod", *where, "--force", "--grace-period=0", "--ignore-not-found")
        everything = _list([*objects, *map(_lease, gone)])
        self._cluster.kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "-", input_text=everything)

    def _taints(self, names: Container[str]) -> dict[str, list[Json]]:
        nodes = json.loads(self._cluster.kubectl("get", "nodes", "-o", "json"))["items"]
        found = {node["metadata"]["name"]: node["spec"].get("taints", []) for node in nodes}
        return {name: taints for name, taints in found.items() if name in names}

    def _renew_for_ever(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            self._renew([found["metadata"]["name"] for found in self._made if found["kind"] == "Node"])

    def _renew(self, names: list[str]) -> None:
        if names:
            leases = _list(map(_lease, names))
            self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input_text=leases)


def _lease(name: str) -> Json:
    """As a kubelet renews it now."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": LEASE_NAMESPACE},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now},
    }


def _list(objects: Iterable[Json]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
