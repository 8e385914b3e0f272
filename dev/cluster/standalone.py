"""A control plane without nodes, for tests that play the kubelet: it needs no network, and leaves the cluster alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import binaries, certs, controlplane, processes
from cluster.layout import Endpoints, Layout

# Others than the local cluster's, so that both can run at the same time.
_ENDPOINTS = Endpoints(
    api_address="127.0.0.1",
    api_port=16443,
    etcd_port=12379,
    etcd_peer_port=12380,
    controller_manager_port=20257,
    scheduler_port=20259,
)


@contextmanager
def control_plane(directory: Path) -> Iterator[Layout]:
    """etcd, API server, controller manager and scheduler, with all their state in `directory`.

    They end with this process, also if it is killed: an etcd that is left over would answer in the next one's place.
    """
    paths = Layout(directory, _ENDPOINTS, launcher=("setpriv", "--pdeathsig", "KILL", "--"))
    for part in (paths.bin, paths.logs, paths.pids, paths.config, paths.pki):
        part.mkdir(parents=True, exist_ok=True)
    binaries.build_all(paths)
    certs.make_all(paths)
    try:
        controlplane.start(paths)
        yield paths
    finally:
        for name in reversed(controlplane.DAEMONS):
            processes.stop(paths, name)
