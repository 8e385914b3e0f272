"""The cluster through its own kubectl."""

import json
from typing import Any

from cluster.layout import Layout
from cluster.shell import ClusterError, run, succeeds


def kubectl(paths: Layout, *arguments: str, input_text: str | None = None) -> str:
    """Run kubectl as the cluster's administrator and return what it printed."""
    return run([paths.bin / "kubectl", f"--kubeconfig={paths.kubeconfig}", *arguments], input_text=input_text)


def apply(paths: Layout, manifests: str) -> None:
    """Bring objects to the state that a manifest describes, whether they exist or not."""
    kubectl(paths, "apply", "--server-side", "--force-conflicts", "-f", "-", input_text=manifests)


def exists(paths: Layout, kind: str, name: str, namespace: str = "default") -> bool:
    """Whether an object is there."""
    return succeeds(
        [paths.bin / "kubectl", f"--kubeconfig={paths.kubeconfig}", "-n", namespace, "get", kind, name, "-o", "name"]
    )


def wait_for_deployment(paths: Layout, namespace: str, name: str, seconds: int = 120) -> None:
    """Wait until every pod of a deployment is ready; on failure show what the cluster says about it."""
    try:
        kubectl(paths, "-n", namespace, "rollout", "status", f"deployment/{name}", f"--timeout={seconds}s")
    except ClusterError as error:
        pods = _told(paths, namespace, "describe", "pods")
        logs = _told(paths, namespace, "logs", f"deployment/{name}", "--all-pods", "--tail=50", "--ignore-errors")
        raise ClusterError(f"{error}\n{pods}\n{logs}") from None


def _told(paths: Layout, namespace: str, *question: str) -> str:
    """What kubectl says to it, be it an error: nothing that explains a failure may take its place."""
    try:
        return kubectl(paths, "-n", namespace, *question)
    except ClusterError as error:
        return str(error)


def get(paths: Layout, *arguments: str) -> dict[str, Any]:
    """Read an object or a list."""
    return dict(json.loads(kubectl(paths, "get", *arguments, "-o", "json")))
