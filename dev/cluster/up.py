"""`up`: from nothing, from a half-started cluster or from a running one to a Ready node with DNS, S3 and Prometheus."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

from cluster import (
    addons,
    binaries,
    certs,
    cgroups,
    controlplane,
    environment,
    images,
    kubectl,
    layout,
    machine,
    node,
    packages,
    processes,
    prometheus,
    storage,
    teardown,
)
from cluster.layout import Layout
from cluster.shell import say, step

DAEMONS = (
    *controlplane.DAEMONS,
    "containerd",
    "kubelet",
    "kube-proxy",
    "pod-discovery",
    "prometheus",
)


def up(paths: Layout) -> None:
    """Start what doesn't run yet. Every step looks at what is there first, so repeating `up` is cheap and safe."""
    machine.check()
    started = time.monotonic()
    with machine.locked():
        teardown.release_killed()
        machine.claim(paths)
        say(f"Local Kubernetes {layout.KUBERNETES_VERSION} in {paths.state} (logs in {paths.logs})")
        paths.make_directories()
        _make_parts(paths)
        _start(paths)
    say(f"Cluster is up after {time.monotonic() - started:.0f} s:  export KUBECONFIG={paths.kubeconfig}")
    say(kubectl.kubectl(paths, "get", "nodes").rstrip())


def tools(paths: Layout) -> None:
    """Make the executables alone (kubectl, helm, promtool): enough to check chart, manifests and metrics."""
    paths.make_directories()
    if shutil.which("promtool") is None:
        packages.install(paths)
    binaries.build_all(paths)


def _make_parts(paths: Layout) -> None:
    packages.install(paths)
    with ThreadPoolExecutor(max_workers=2) as pool:  # one computes, the other waits for downloads
        parts = [pool.submit(binaries.build_all, paths), pool.submit(images.ensure_base)]
        for part in parts:
            part.result()


def _start(paths: Layout) -> None:
    archives = images.ensure_all()
    if not (paths.config / "kubelet.kubeconfig").exists():
        with step("certificates"):
            certs.make_all(paths)
    cgroups.make()
    machine.prepare_network()
    if not any(processes.running(paths, name) for name in DAEMONS):
        machine.check_ports(paths.endpoints)
    node.start_containerd(paths)
    with ThreadPoolExecutor(max_workers=1) as pool:
        *system, trainer = archives
        importing = pool.submit(images.import_all, paths, system)
        importing_rest = pool.submit(images.import_all, paths, [trainer])
        controlplane.start(paths)
        node.start_kubelet(paths)
        importing.result()
        addons.start_dns(paths)
        addons.make_namespaces(paths)
        storage.start(paths)
        for namespace in ("default", layout.OPERATOR_NAMESPACE):
            environment.claim(paths, namespace)
        prometheus.start(paths)
        importing_rest.result()
