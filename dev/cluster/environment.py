"""The Python environment and the sources for pods: this clone's directory as a PersistentVolumeClaim per namespace.

The restricted Pod Security Standard forbids hostPath volumes in pods, but not claims. So a pod of daily work runs
today's sources without an image build, under the same security rules as in production.
"""

from cluster import kubectl, templates
from cluster.layout import Layout

CLAIM = "qlora-env"


def claim(paths: Layout, namespace: str) -> None:
    """Make the volume and the claim `qlora-env` in a namespace, and wait until they are bound."""
    kubectl.apply(paths, templates.render(paths, "manifests/environment.yaml", namespace=namespace))
    wait = ("wait", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s", f"pvc/{CLAIM}")
    kubectl.kubectl(paths, "-n", namespace, *wait)
