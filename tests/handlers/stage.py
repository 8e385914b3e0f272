"""A namespace with the real operator as a process, and a test that plays the kubelet.

Pods never get a node there, since every pod mounts a claim that never binds. So no kubelet touches them, and the test
writes their statuses: what happens to a Job in consequence is the real Job controller's work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_operator.handlers import ENV_LEASE, ENV_METRICS_PORT, ENV_NAMESPACE, ENV_POD
from qlora_operator.metrics import METRICS_PORT
from qlorajob.run import RunReport
from tests.support.live import Cluster, eventually

REPOSITORY = Path(__file__).parents[2]
CLAIM = "never-bound"
LOOK_SECONDS = 120.0
"""A machine that compiles something else at the same time takes half a minute to start the operator."""
Json = dict[str, Any]


@dataclass
class OperatorProcess:
    """`kopf run` with the rights of the chart's ServiceAccount in one namespace.

    With a `lease` it is one of several, each with a `number` of its own (and with it an identity and ports).
    """

    namespace: str
    kubeconfig: Path
    config: Path
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)
    lease: str = ""
    number: int = 0

    @property
    def identity(self) -> str:
        return f"operator-{self.number}"

    def healthy(self) -> bool:
        try:
            return _get(f"http://127.0.0.1:{18080 + self.number}/healthz") is not None
        except OSError:
            return False

    def metrics(self) -> str:
        """Nothing as long as nobody answers."""
        try:
            return _get(f"http://127.0.0.1:{METRICS_PORT + self.number}/metrics")
        except OSError:
            return ""

    def start(self) -> None:
        command = [sys.executable, "-m", "kopf", "run", "--standalone"]
        command += [f"--module=qlora_operator.{name}" for name in ("handlers", "node_handlers", "slice_handlers")]
        command += [f"--namespace={self.namespace}", "--log-format=json"]
        command += [f"--liveness=http://127.0.0.1:{18080 + self.number}/healthz"]
        environment = os.environ | {
            "KUBECONFIG": str(self.kubeconfig),
            "QLORA_OPERATOR_CONFIG": str(self.config),
            ENV_NAMESPACE: self.namespace,
            ENV_METRICS_PORT: str(METRICS_PORT + self.number),
            "PYTHONPATH": str(REPOSITORY / "operator"),
        }
        if self.lease:
            environment |= {ENV_LEASE: self.lease, ENV_POD: self.identity}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.log.parent)

    def kill(self) -> None:
        """As a node failure would: no goodbye."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(30)
        self.process = None


@dataclass(frozen=True)
class Stage:
    """What a test does and sees."""

    cluster: Cluster
    name: str
    operator: OperatorProcess

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, input_text=input_text)

    def get(self, *arguments: str) -> Json:
        found: Json = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, name: str, **spec: Any) -> None:
        """Create or change a QLoRAJob; `spec` holds top-level fields of the spec."""
        base = {
            "model": {"uri": "s3://models/tiny"},
            "dataset": {"uri": "s3://datasets/rows"},
            "output": {"uri": f"s3://adapters/{name}", "credentialsSecretRef": {"name": "s3-credentials"}},
            "resources": {"gpuClass": "cpu"},
        }
        self.kubectl(
            *("apply", "-f", "-"),
            input_text=json.dumps(
                {
                    "apiVersion": "qlora.dev/v1alpha1",
                    "kind": "QLoRAJob",
                    "metadata": {"name": name},
                    "spec": base | spec,
                }
            ),
        )

    def status(self, name: str) -> Json:
        status: Json = self.get("qlj", name).get("status", {})
        return status

    def condition(self, name: str, kind: str) -> Json:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def until(self, check: Callable[[], Any], what: str) -> Any:
        """Wait for a fact; show the operator's last words when it doesn't come."""
        try:
            return eventually(check, LOOK_SECONDS, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.operator.log.read_text()[-4000:]}") from None

    def phase(self, name: str, phase: str) -> Json:
        """Wait for a phase; the status then."""

        def check() -> Json | None:
            status = self.status(name)
            return status if status.get("phase") == phase else None

        found: Json = self.until(check, f"{name} is {phase}")
        return found

    def jobs(self, name: str, step: str) -> list[Json]:
        items: list[Json] = self.get("jobs", "-l", f"qlora.dev/job={name},qlora.dev/step={step}")["items"]
        return sorted(items, key=lambda item: item["metadata"]["creationTimestamp"])

    def events(self, name: str) -> list[str]:
        items = self.get("events", f"--field-selector=involvedObject.name={name}")["items"]
        return [item["reason"] for item in items]

    # The kubelet

    def pod(self, name: str, step: str) -> str:
        """Wait for the pod of the step's Job that hasn't ended yet; its name."""

        def check() -> str | None:
            items = self.get("pods", "-l", f"qlora.dev/job={name},qlora.dev/step={step}")["items"]
            live = [p for p in items if p["status"]["phase"] in ("Pending", "Running")]
            live = [p for p in live if "deletionTimestamp" not in p["metadata"]]
            return live[0]["metadata"]["name"] if live else None

        found: str = self.until(check, f"a pod of {name}'s {step}")
        return found

    def run(self, pod: str) -> None:
        self._container(pod, "Running", {"running": {"startedAt": _now()}})

    def finish(self, pod: str, report: RunReport) -> None:
        """The container ends as its report says."""
        self.end(pod, int(report.exit_code), report.to_json())

    def end(self, pod: str, code: int, message: str = "") -> None:
        ended = {"exitCode": code, "message": message, "startedAt": _now(), "finishedAt": _now(), "reason": "Ended"}
        self._container(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    def wait_in(self, pod: str, reason: str, message: str) -> None:
        """The container can't start."""
        self._container(pod, "Pending", {"waiting": {"reason": reason, "message": message}})

    def _container(self, pod: str, phase: str, state: Json) -> None:
        container = {"name": "trainer", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        conditions = [{"type": "PodScheduled", "status": "True", "reason": "Scheduled"}]
        status = {"phase": phase, "containerStatuses": [container], "conditions": conditions}
        patch = json.dumps({"status": status})
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "-p", patch)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
