"""What the cluster needs of the machine, and which clone's cluster the machine runs."""

import json
import os
import platform
import shutil
import socket
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cluster import layout, shell
from cluster.layout import Endpoints, Layout
from cluster.shell import ClusterError, run, succeeds

_RECORD = Path("/run/qlora-operator-cluster.json")
_LOCK = Path("/run/qlora-operator-cluster.lock")
_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_ALTERNATIVES = """What works here instead:
  - any cluster of yours, for example kind's:  make demo KUBECONFIG=~/.kube/config
  - no cluster at all:                         qlora run examples/quickstart.yaml"""


def check() -> None:
    """Stop with the alternatives unless this is a machine that the local cluster can run on."""
    problem = None
    if sys.platform != "linux" or platform.machine() != "x86_64":
        problem = f"it needs Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    elif os.geteuid() != 0:
        problem = "it needs root, to run containers and to make network interfaces"
    elif shutil.which("apt-get") is None:
        problem = "it takes its parts from Debian packages, and this machine has no apt"
    elif not Path("/sys/fs/cgroup").is_dir():
        problem = "it needs control groups, and /sys/fs/cgroup is not there"
    if problem:
        raise ClusterError(f"The local cluster can't run on this machine: {problem}.\n{_ALTERNATIVES}")


def locked() -> AbstractContextManager[None]:
    """Let only one `up` or `down` work at a time on this machine."""
    return shell.locked(_LOCK, "another `up` or `down` on this machine")


def record() -> dict[str, Any]:
    """What the last `up` wrote down about the cluster of this machine; empty if there is none."""
    try:
        return dict(json.loads(_RECORD.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def owner() -> Path | None:
    """The clone that the machine's cluster belongs to, running or half-stopped."""
    found = record().get("repository")
    return Path(found) if found else None


def claim(paths: Layout) -> None:
    """Write down that the machine's cluster is this clone's, unless another clone's is running."""
    other = owner()
    if other is not None and other != paths.repository:
        raise ClusterError(
            f"The cluster of another clone is running on this machine: {other}\n"
            f"Use it with KUBECONFIG={other}/.cluster/kubeconfig, or stop it with `make cluster-down`."
        )
    if other is None:
        content = {"repository": str(paths.repository), "ip_forward": _IP_FORWARD.read_text().strip()}
        _RECORD.write_text(json.dumps(content))


def forget() -> None:
    """Remove the record: the machine has no cluster any more."""
    _RECORD.unlink(missing_ok=True)


def check_ports(listen: Endpoints) -> None:
    """Say which port is taken before a component fails with a less helpful message."""
    ports = {
        "the API server": (listen.api_address, listen.api_port),
        "etcd": ("127.0.0.1", listen.etcd_port),
        "the kubelet": (layout.NODE_ADDRESS, layout.KUBELET_PORT),
        "pod discovery": ("127.0.0.1", layout.DISCOVERY_PORT),
        "Prometheus": ("127.0.0.1", layout.PROMETHEUS_PORT),
    }
    for component, address in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError:
                raise ClusterError(
                    f"Port {address[1]}, which {component} needs, is taken by another program of this machine. "
                    f"`ss -ltnp 'sport = :{address[1]}'` names it."
                ) from None


def prepare_network() -> None:
    """Make the bridge with the node's address, and let pods reach the outside through it."""
    if not _bridge_exists():
        run(["ip", "link", "add", layout.BRIDGE, "type", "bridge"])
    run(["ip", "address", "replace", f"{layout.NODE_ADDRESS}/16", "dev", layout.BRIDGE])
    run(["ip", "link", "set", layout.BRIDGE, "up"])
    _IP_FORWARD.write_text("1")
    if _BRIDGE_FILTER.exists():  # answers from a Service's pod to another pod have to pass the NAT again
        _BRIDGE_FILTER.write_text("1")
    rules = (layout.SOURCE / "config" / "pods.nft").read_text()
    run(["nft", "-f", "-"], input_text=rules.replace("${pod_cidr}", layout.POD_CIDR))


def remove_network() -> None:
    """Take away interfaces and rules: the bridge, kube-proxy's tables and ours."""
    if not (shutil.which("nft") and shutil.which("ip")):
        return  # `up` ended before these were installed, so it made nothing
    for family in ("ip", "ip6"):
        for table in ("kube-proxy", "qlora-operator"):
            # Declaring a table first makes its removal succeed whether it is there or not.
            run(["nft", "-f", "-"], input_text=f"table {family} {table} {{}}\ndelete table {family} {table}\n")
    links = json.loads(run(["ip", "-json", "link", "show", "type", "veth"]) or "[]")
    for link in links:
        if link.get("master") == layout.BRIDGE:
            run(["ip", "link", "delete", link["ifname"]])
    if _bridge_exists():
        run(["ip", "link", "delete", layout.BRIDGE])
    before = record().get("ip_forward")
    if before is not None:
        _IP_FORWARD.write_text(before)


def _bridge_exists() -> bool:
    return succeeds(["ip", "link", "show", "dev", layout.BRIDGE])
