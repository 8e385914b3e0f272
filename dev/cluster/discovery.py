"""Tells Prometheus which pods to scrape (HTTP service discovery): Debian's build has Kubernetes' discovery left out.

The rule is the one of the chart's PodMonitor: pods that are part of the project and name a container port `metrics`.
Labels are few and bounded on purpose: namespace, pod and job, never a uid.
"""

import json
import ssl
import sys
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster import layout, processes
from cluster.layout import Layout

NAME = "pod-discovery"
URL = f"http://127.0.0.1:{layout.DISCOVERY_PORT}/"
_SELECTOR = {"labelSelector": "app.kubernetes.io/part-of=qlora-operator", "fieldSelector": "status.phase=Running"}
_PODS = f"/api/v1/pods?{urllib.parse.urlencode(_SELECTOR)}"


def start(paths: Layout) -> None:
    """Start this module as a process of its own, under a name that it can be recognised by."""
    interpreter = paths.bin / NAME
    interpreter.unlink(missing_ok=True)
    interpreter.symlink_to(Path(sys.executable).resolve())
    command = [str(interpreter), "-m", "cluster.discovery", str(paths.repository)]
    env = {"PYTHONPATH": str(layout.DEV)}
    processes.start(paths, NAME, command, env=env, ready=lambda: processes.answers(URL))


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prometheus' target groups for the pods that have an address and a metrics port."""
    groups = []
    for pod in pods:
        metadata, address = pod["metadata"], pod["status"].get("podIP")
        containers = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
        ports = {
            port["containerPort"] for c in containers for port in c.get("ports", []) if port.get("name") == "metrics"
        }
        labels = {"namespace": metadata["namespace"], "pod": metadata["name"]}
        job = metadata.get("labels", {}).get("qlora.dev/job")
        if job:
            labels["qlorajob"] = job
        if address and ports:
            groups.append({"targets": [f"{address}:{port}" for port in sorted(ports)], "labels": labels})
    return groups


def _serve(paths: Layout) -> None:
    tls = ssl.create_default_context(cafile=str(paths.pki / "ca.crt"))
    tls.load_cert_chain(paths.pki / "admin.crt", paths.pki / "admin.key")
    api = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))

    class Handler(BaseHTTPRequestHandler):
        """Each question is answered with the pods of this moment."""

        def do_GET(self) -> None:
            """Answer in the format of Prometheus' HTTP service discovery."""
            try:
                with api.open(paths.endpoints.api + _PODS, timeout=5) as response:
                    body = json.dumps(targets(json.load(response)["items"])).encode()
            except OSError as error:
                self.send_error(502, f"the API server does not answer: {error}")
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing: there is a question every second."""

    ThreadingHTTPServer(("127.0.0.1", layout.DISCOVERY_PORT), Handler).serve_forever()


if __name__ == "__main__":
    _serve(Layout(Path(sys.argv[1])))
