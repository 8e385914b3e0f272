"""What clusters do to jobs, done on purpose. Each method or block is one fault, and is counted as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster import controlplane, node, processes
from cluster.layout import API_SERVICE_ADDRESS, NODE_NAME
from cluster.shell import run
from qlora_operator.experience import CONFIG_MAP
from qlorajob import names
from tests.chaos.history import Json, Version
from tests.chaos.ledger import LEDGER
from tests.support.live import Cluster, Namespace, eventually

DEPLOYMENT = "deployment/qlora-operator"
OURS = f"app.kubernetes.io/part-of={names.PART_OF}"


@dataclass(frozen=True)
class Faults:
    """Faults of pods and of the cluster's own parts. Those of S3 are FaultyS3's."""

    cluster: Cluster
    namespace: Namespace

    # The operator

    def operator_killed(self) -> None:
        """SIGKILL of who acts; its pod goes too: a restart in place would wait longer each time."""
        LEDGER.faults += 1
        pod = eventually(self._leading_pod, 60, "an operator leads")
        self._kill_container(pod)
        self._in_system("delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0", "--wait=false")

    def operator_rolled(self, config: str) -> None:
        """Another version, that would make other Jobs of the same spec: a changed setting, and a changed template."""
        LEDGER.faults += 1
        self.set_operator_config(config)

    def watches_cut(self) -> None:
        """Every connection of the operator to the API server ends at once."""
        LEDGER.faults += 1
        for pod in self.operators():
            inside = ("nsenter", "--target", str(self._pid(pod)), "--net")
            assert run([*inside, "ss", "--no-header", "--kill", "--tcp", "dst", API_SERVICE_ADDRESS])

    def leader(self) -> str:
        """The pod that holds the Lease."""
        return self._in_system("get", "lease", "qlora-operator", "-o", "jsonpath={.spec.holderIdentity}")

    def _leading_pod(self) -> Json | None:
        leader = self.leader()
        return next((pod for pod in self.operators() if pod["metadata"]["name"] == leader), None)

    def operators(self) -> list[Json]:
        """The operator's pods that run."""
        pods: list[Json] = json.loads(self._in_system("get", "pods", "-l", OURS, "-o", "json"))["items"]
        return [pod for pod in pods if pod["status"]["phase"] == "Running"]

    def operator_config(self) -> str:
        """The operator's settings, as a file."""
        found = json.loads(self._in_system("get", "configmap", "qlora-operator", "-o", "json"))
        config: str = found["data"]["config.yaml"]
        return config

    def set_operator_config(self, config: str) -> None:
        """Change the settings, and replace the operator by one that reads them."""
        patch = json.dumps({"data": {"config.yaml": config}})
        self._in_system("patch", "configmap", "qlora-operator", "--type=merge", "-p", patch)
        self._in_system("rollout", "restart", DEPLOYMENT)
        self.until_the_operator_works()

    def observations(self) -> Json:
        """What the operator has learnt from runs."""
        found: Json = json.loads(self._in_system("get", "configmap", CONFIG_MAP, "-o", "json")).get("data") or {}
        return found

    def set_observations(self, data: Json) -> None:
        """Let it know this and nothing else."""
        forgotten = dict.fromkeys(self.observations())
        self._in_system("patch", "configmap", CONFIG_MAP, "--type=merge", "-p", json.dumps({"data": forgotten | data}))

    @contextmanager
    def two_operators(self) -> Iterator[None]:
        """A second one beside the first, until the block ends."""
        self._in_system("scale", DEPLOYMENT, "--replicas=2")
        try:
            self.until_the_operator_works()
            yield
        finally:
            self._in_system("scale", DEPLOYMENT, "--replicas=1")

    def until_the_operator_works(self) -> None:
        """Wait until what was replaced is replaced."""
        self._in_system("rollout", "status", DEPLOYMENT, "--timeout=180s")

    def _in_system(self, *arguments: str) -> str:
        return self.cluster.kubectl("-n", self.cluster.target.operator_namespace, *arguments)

    # Pods

    def trainer_killed(self, pod: Version) -> None:
        """SIGKILL: no goodbye, exit code 137."""
        LEDGER.faults += 1
        self._kill_container(pod.raw)

    def pod_deleted(self, pod: Version) -> None:
        """By hand: SIGTERM, then the grace period."""
        LEDGER.faults += 1
        self.namespace.kubectl("delete", "pod", pod.raw["metadata"]["name"], "--wait=false")

    def pod_evicted(self, pod: Version) -> None:
        """Through the eviction API, as a drain or the scheduler's preemption does."""
        LEDGER.faults += 1
        name = pod.raw["metadata"]["name"]
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        path = f"/api/v1/namespaces/{self.namespace.name}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", input_text=json.dumps(eviction))

    def job_suspended(self, job: Version) -> None:
        """As Kueue preempts: the Job's pod gets SIGTERM, and no other comes until the Job is admitted again."""
        LEDGER.faults += 1
        name = job.raw["metadata"]["name"]
        self.namespace.kubectl("patch", "job", name, "--type=merge", "-p", '{"spec": {"suspend": true}}')

    def _kill_container(self, pod: Json) -> None:
        container = _container_id(pod)
        if container:
            run([*node.ctr(self.cluster.layout), "tasks", "kill", "--signal", "SIGKILL", container])

    def _pid(self, pod: Json) -> int:
        tasks = run([*node.ctr(self.cluster.layout), "tasks", "list"]).splitlines()
        container = _container_id(pod)
        return next(int(line.split()[1]) for line in tasks if line.split()[0] == container)

    # The node

    @contextmanager
    def node_drained(self) -> Iterator[None]:
        """The node takes no pods, and ours are asked to leave, until the block ends. S3 is elsewhere."""
        LEDGER.faults += 1
        self.cluster.kubectl("cordon", NODE_NAME)
        selected = f"--pod-selector={OURS}"
        arguments = ("drain", NODE_NAME, selected, "--ignore-daemonsets", "--delete-emptydir-data", "--force")
        command = [str(self.cluster.layout.bin / "kubectl"), f"--kubeconfig={self.cluster.kubeconfig}", *arguments]
        drain = subprocess.Popen([*command, "--timeout=180s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
            assert drain.wait(180) == 0
        finally:
            drain.terminate()
            self.cluster.kubectl("uncordon", NODE_NAME)

    @contextmanager
    def kubelet_stopped(self) -> Iterator[None]:
        """Nobody starts, ends or reports on pods until the block ends."""
        LEDGER.faults += 1
        processes.stop(self.cluster.layout, "kubelet")
        try:
            yield
        finally:
            node.start_kubelet(self.cluster.layout)

    # The control plane

    def api_server_restarted(self) -> None:
        """Killed, and started again."""
        LEDGER.faults += 1
        pid = self._daemon("kube-apiserver")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: processes.running(self.cluster.layout, "kube-apiserver") is None, 10, "it is dead")
        controlplane.start(self.cluster.layout)

    def etcd_paused(self, seconds: float) -> None:
        """As by a disk that hangs: the API server is there, but knows nothing."""
        LEDGER.faults += 1
        pid = self._daemon("etcd")
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)  # the fault itself
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: self.cluster.try_kubectl("get", "--raw", "/readyz").returncode == 0, 60, "it is ready")

    def _daemon(self, name: str) -> int:
        pid = processes.running(self.cluster.layout, name)
        assert pid is not None, f"{name} doesn't run"
        return pid


def _container_id(pod: Json) -> str:
    statuses = pod["status"].get("containerStatuses") or [{}]
    container: str = statuses[0].get("containerID", "").removeprefix("containerd://")
    return container
