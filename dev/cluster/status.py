"""`status`: what runs, where, and what is wrong."""

from cluster import kubectl, machine, processes, prometheus, storage
from cluster.layout import Layout
from cluster.shell import ClusterError, say
from cluster.up import DAEMONS


def status(paths: Layout) -> None:
    """Print each process, the node and the addresses; fails unless all of it is well, so that scripts can ask."""
    owner = machine.owner()
    if owner is None:
        raise ClusterError("no local cluster: `make cluster-up` starts one")
    if owner != paths.repository:
        say(f"The cluster of this machine belongs to {owner}")
        paths = Layout(owner)
    missing = []
    for name in DAEMONS:
        pid = processes.running(paths, name)
        if pid is None:
            missing.append(name)
        say(f"  {name:24} {f'pid {pid}' if pid else 'NOT RUNNING'}")
    if missing:
        raise ClusterError(f"not running: {', '.join(missing)} (logs in {paths.logs}); `make cluster-up` starts them")
    say(kubectl.kubectl(paths, "get", "nodes,pods", "--all-namespaces").rstrip())
    say(f"  kubeconfig   {paths.kubeconfig}")
    say(f"  S3           {storage.IN_CLUSTER_ENDPOINT} in pods; {paths.s3_env} for this machine")
    say(f"  Prometheus   {prometheus.URL}")
    say(f"  logs         {paths.logs}")
