"""Nodes that aren't there: the scheduler binds pods to them, and the operator reads their labels.

A real node is Ready while its kubelet renews its lease; here a thread does. Each has the taint `gpus.SIMULATED`, so
that only pods of the tests that make them go there.
"""

from __future__ import annotations

import json
import threading
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
        self._made: list[tuple[str, str]] = []
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
        for kind_of, name in reversed(self._made):
            self.remove(kind_of, name)

    def add(self, *objects: Json) -> None:
        """Create them; returns when the nodes among them are Ready and nothing but their own taints is on them."""
        for found in objects:
            self._made.append((found["kind"].lower(), found["metadata"]["name"]))
        nodes = [found for found in objects if found["kind"] == "Node"]
        self._renew([found["metadata"]["name"] for found in nodes])
        self._create(list(objects))
        for found in nodes:
            name, taints = found["metadata"]["name"], found["spec"]["taints"]
            eventually(lambda n=name, t=taints: self._taints(n) == t, 30, f"{name} is ready")  # type: ignore[misc]

    def remove(self, kind: str, name: str) -> None:
        """Delete one, and what is on it: no kubelet would end its pods."""
        self._made.remove((kind, name))
        if kind == "node":
            on_it = ("--all-namespaces", f"--field-selector=spec.nodeName={name}")
            self._cluster.kubectl("delete", "pods", *on_it, "--force", "--grace-period=0", "--ignore-not-found")
            self._cluster.kubectl("-n", LEASE_NAMESPACE, "delete", "lease", name, "--ignore-not-found")
        self._cluster.kubectl("delete", kind, name, "--ignore-not-found")

    def _create(self, objects: list[Json]) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        self._cluster.kubectl("create", "-f", "-", input_text=json.dumps(items))

    def _taints(self, name: str) -> list[Json]:
        found = json.loads(self._cluster.kubectl("get", "node", name, "-o", "json"))
        taints: list[Json] = found["spec"].get("taints", [])
        return taints

    def _renew_for_ever(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            self._renew([name for kind, name in list(self._made) if kind == "node"])

    def _renew(self, names: list[str]) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        leases = [
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": name, "namespace": LEASE_NAMESPACE},
                "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now},
            }
            for name in names
        ]
        if leases:
            items = json.dumps({"apiVersion": "v1", "kind": "List", "items": leases})
            self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input_text=items)
