"""What every cluster has besides its node: DNS for Services, and namespaces that keep pods restricted."""

from cluster import kubectl, layout, templates
from cluster.layout import Layout
from cluster.shell import step


def start_dns(paths: Layout) -> None:
    """Deploy CoreDNS and wait for it: pods that start earlier would cache failures."""
    with step("CoreDNS"):
        kubectl.apply(paths, templates.render(paths, "manifests/coredns.yaml"))
        kubectl.wait_for_deployment(paths, "kube-system", "coredns")


def make_namespaces(paths: Layout) -> None:
    """Make the namespaces that work runs in; each enforces the restricted Pod Security Standard."""
    rendered = (templates.render(paths, "manifests/namespaces.yaml", namespace=n) for n in layout.RESTRICTED_NAMESPACES)
    kubectl.apply(paths, "---\n".join(rendered))
