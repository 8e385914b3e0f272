"""containerd, kubelet and kube-proxy: this machine as the cluster's only node, with a GPU that it says it has."""

import json
import shutil
from pathlib import Path

from cluster import kubectl, layout, processes, templates
from cluster.layout import Layout
from cluster.shell import ClusterError, Command, run, step, succeeds, wait_until

_CNI_PLUGINS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_RESOLV_CONFS = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))
_APPARMOR = Path("/sys/kernel/security/apparmor")

# What GPU feature discovery and the device plugin would say about a machine with one NVIDIA L4.
GPU_LABELS = {
    "nvidia.com/gpu.present": "true",
    "nvidia.com/gpu.product": "NVIDIA-L4",
    "nvidia.com/gpu.memory": "23034",
    "nvidia.com/gpu.count": "1",
    "nvidia.com/gpu.family": "ada-lovelace",
    "nvidia.com/gpu.compute.major": "8",
    "nvidia.com/gpu.compute.minor": "9",
}
GPU_RESOURCES = {"nvidia.com/gpu": "1"}


def start_containerd(paths: Layout) -> None:
    """Start the container runtime; images can be imported as soon as it answers."""
    executable = shutil.which("containerd")
    if executable is None:
        raise ClusterError("containerd is not installed")
    config = templates.write(
        paths,
        "config/containerd.toml",
        cni_plugins=_existing(_CNI_PLUGINS),
        disable_apparmor=str(not _APPARMOR.exists()).lower(),
    )
    templates.write(paths, "config/10-qlora.conflist", paths.state / "cni/net.d/10-qlora.conflist")
    with step("containerd"):
        command: Command = [executable, "--config", config]
        processes.start(paths, "containerd", command, ready=lambda: containerd_answers(paths))


def start_kubelet(paths: Layout) -> None:
    """Start kubelet and kube-proxy; returns when the node is Ready."""
    if paths.kubelet_root != paths.kubelet_data and not paths.kubelet_root.is_mount():
        run(["mount", "--bind", paths.kubelet_data, paths.kubelet_root])
    kubelet_config = templates.write(paths, "config/kubelet.yaml", resolv_conf=_existing(_RESOLV_CONFS))
    proxy_config = templates.write(paths, "config/kube-proxy.yaml")
    with step("kubelet and kube-proxy"):
        command: Command = [
            paths.bin / "kubelet",
            f"--config={kubelet_config}",
            f"--kubeconfig={paths.config / 'kubelet.kubeconfig'}",
            f"--root-dir={paths.kubelet_root}",
            f"--cert-dir={paths.pki}",
            f"--hostname-override={layout.NODE_NAME}",
            f"--node-ip={layout.NODE_ADDRESS}",
        ]
        healthy = "http://127.0.0.1:10248/healthz"
        processes.start(paths, "kubelet", command, ready=lambda: processes.answers(healthy))
        command = [paths.bin / "kube-proxy", f"--config={proxy_config}"]
        healthy_proxy = "http://127.0.0.1:10256/livez"
        processes.start(paths, "kube-proxy", command, ready=lambda: processes.answers(healthy_proxy))
    with step(f"node {layout.NODE_NAME} Ready, with a simulated GPU"):
        kubelet_log = "became no node that is Ready"
        wait_until(lambda: is_ready(paths), 90, lambda: processes.explain(paths, "kubelet", kubelet_log))
        _pretend_gpu(paths)


def is_ready(paths: Layout) -> bool:
    """Whether the node exists and reports Ready."""
    if not kubectl.exists(paths, "node", layout.NODE_NAME):
        return False
    conditions = kubectl.get(paths, "node", layout.NODE_NAME)["status"].get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def ctr(paths: Layout) -> list[str]:
    """The containerd client, for the images and containers that the kubelet sees."""
    return ["ctr", "--address", str(paths.containerd_socket), "--namespace", "k8s.io"]


def containerd_answers(paths: Layout) -> bool:
    """Whether the container runtime runs."""
    return succeeds([*ctr(paths), "version"])


def _pretend_gpu(paths: Layout) -> None:
    labels = json.dumps({"metadata": {"labels": GPU_LABELS}})
    kubectl.kubectl(paths, "patch", "node", layout.NODE_NAME, "--type=merge", "-p", labels)
    status = json.dumps({"status": {"capacity": GPU_RESOURCES, "allocatable": GPU_RESOURCES}})
    kubectl.kubectl(paths, "patch", "node", layout.NODE_NAME, "--subresource=status", "--type=merge", "-p", status)


def _existing(candidates: tuple[Path, ...]) -> Path:
    for path in candidates:
        if path.exists():
            return path
    raise ClusterError(f"none of these exists: {', '.join(str(path) for path in candidates)}")
