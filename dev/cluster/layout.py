"""Where everything of the cluster is, and which names, addresses and ports it uses."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KUBERNETES_VERSION = "v1.36.3"

NODE_NAME = "qlora-node"
BRIDGE = "qlora0"
# The node's address is the bridge's own: it is the same on every machine, pods reach it without routing, and nothing
# outside the machine can. So neither certificates nor kubeconfigs depend on the network that the machine is in.
NODE_ADDRESS = "10.85.0.1"
POD_CIDR = "10.85.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
DNS_DOMAIN = "cluster.local"

KUBELET_PORT = 10250
DISCOVERY_PORT = 9091
PROMETHEUS_PORT = int(os.environ.get("QLORA_PROMETHEUS_PORT", "9090"))

# Every process that the cluster starts, pods included, is in this control group: stopping the cluster means ending
# whatever is in there, also when its records are lost.
CGROUP = "qlora-operator"

DEV_NAMESPACE = "qlora-dev"
OPERATOR_NAMESPACE = "qlora-system"
RESTRICTED_NAMESPACES = ("default", DEV_NAMESPACE, OPERATOR_NAMESPACE)

PAUSE_IMAGE = "localhost/qlora/pause:dev"
COREDNS_IMAGE = "localhost/qlora/coredns:dev"
VERSITYGW_IMAGE = "localhost/qlora/versitygw:dev"
BASE_IMAGE = "localhost/qlora/base:bookworm"
OPERATOR_IMAGE = "localhost/qlora/operator:dev"
TRAINER_IMAGE = "localhost/qlora/trainer:dev"
THIN_TRAINER_IMAGE = "localhost/qlora/trainer-thin:dev"

# A Unix socket's path has room for 107 characters; the longest one below the run directory takes about 45 of them.
_LONGEST_RUN_DIRECTORY = 60

SOURCE = Path(__file__).resolve().parent
DEV = SOURCE.parent


def cache_directory() -> Path:
    """What is expensive to make and equal for every clone: executables, images, build layers."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "qlora-operator"


@dataclass(frozen=True)
class Endpoints:
    """Where a control plane listens. All but the API server do so on the loopback alone."""

    api_address: str = NODE_ADDRESS
    api_port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    controller_manager_port: int = 10257
    scheduler_port: int = 10259

    @property
    def api(self) -> str:
        """URL of the API server."""
        return f"https://{self.api_address}:{self.api_port}"


@dataclass(frozen=True)
class Layout:
    """The directories of one clone's cluster, all below the clone's ignored `.cluster/`."""

    repository: Path = DEV.parent
    endpoints: Endpoints = Endpoints()
    launcher: tuple[str, ...] = ()
    """Command in front of every daemon's own, which it has to become."""

    @property
    def state(self) -> Path:
        """Everything that `down` removes."""
        return self.repository / ".cluster"

    @property
    def bin(self) -> Path:
        """Links to the cached executables: kubectl, helm and the components."""
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.state / "logs"

    @property
    def pids(self) -> Path:
        """One pid file per process."""
        return self.state / "pids"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.state / "pki"

    @property
    def config(self) -> Path:
        """The rendered configuration files."""
        return self.state / "config"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, with its certificates embedded."""
        return self.state / "kubeconfig"

    @property
    def s3_data(self) -> Path:
        """The S3 gateway's buckets, as directories."""
        return self.state / "s3-data"

    @property
    def s3_env(self) -> Path:
        """The S3 gateway's address and root credentials for use on the host."""
        return self.state / "s3.env"

    @cached_property
    def run(self) -> Path:
        """Sockets and containerd's state: below `.cluster/` unless the clone's path is too long for a socket's."""
        run = self.state / "run"
        if len(str(run)) <= _LONGEST_RUN_DIRECTORY:
            return run
        digest = hashlib.sha256(str(self.repository).encode()).hexdigest()[:8]
        return Path("/run") / f"qlora-{digest}"

    @property
    def containerd_socket(self) -> Path:
        """Where containerd listens for the kubelet and for ctr."""
        return self.run / "containerd.sock"

    @property
    def kubelet_root(self) -> Path:
        """The kubelet's own state, and the volumes it mounts. It makes sockets in there, so its path is short, too."""
        return self.kubelet_data if self.run.parent == self.state else self.run / "kubelet"

    @property
    def kubelet_data(self) -> Path:
        """Where the kubelet's state really is: on the clone's disk, also if it is mounted to a shorter path."""
        return self.state / "kubelet"

    def pid_file(self, name: str) -> Path:
        """The pid file of the process that is called so."""
        return self.pids / f"{name}.pid"

    def log_file(self, name: str) -> Path:
        """The log of the process that is called so."""
        return self.logs / f"{name}.log"

    def make_directories(self) -> None:
        """Make what `up` writes to; what only root may read is closed to everybody else."""
        for directory in (self.bin, self.logs, self.pids, self.config, self.run, self.kubelet_root, self.kubelet_data):
            directory.mkdir(parents=True, exist_ok=True)
        self.pki.mkdir(mode=0o700, parents=True, exist_ok=True)
