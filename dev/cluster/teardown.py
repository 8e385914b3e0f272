"""`down`: leave no process, mount, interface or rule behind, whatever state the cluster is in."""

import shutil
from pathlib import Path

from cluster import cgroups, machine, processes
from cluster.layout import Layout
from cluster.shell import ClusterError, run, say, step, succeeds

# Paths that containerd, CNI and the kubelet have built in; others may use them too, so only ours is removed.
_CNI_RESULTS = Path("/var/lib/cni/results")
_SHIM_SOCKETS = Path("/run/containerd/s")
_CONTAINER_LOGS = Path("/var/log/containers")


def down(paths: Layout) -> None:
    """Stop the machine's cluster, whichever clone it belongs to, and remove its state. Caches stay."""
    owner = machine.owner()
    if owner is None and not cgroups.processes() and not _mounts_below(paths.state) + _mounts_below(paths.run):
        _remove(paths.state)
        say("No local cluster is running")
        return
    machine.check()
    with machine.locked():
        if owner is not None and owner != paths.repository:
            say(f"The cluster of this machine belongs to {owner}: stopping that one")
            paths = Layout(owner)
        with step("stopping the cluster"):
            # The kubelet first: it would start again what is killed below.
            processes.stop(paths, "kubelet", seconds=5)
            cgroups.end_all()
        with step("removing mounts, interfaces and state"):
            _release(paths)
            for directory in (paths.run, paths.state):
                _remove(directory)
            machine.forget()
    say("The local cluster is gone; executables and images stay in the cache")


def release_killed() -> None:
    """Free the machine of a cluster that was killed instead of stopped. What it has on disk stays.

    Its pods' network namespaces outlive them and go on answering at their addresses, which the next cluster's pods get.
    """
    owner = machine.owner()
    if owner is not None and not cgroups.processes():
        with step(f"releasing what the killed cluster of {owner} held"):
            _release(Layout(owner))
        machine.forget()


def _release(paths: Layout) -> None:
    """Give the machine back everything but the disk: mounts, interfaces, rules, and entries in shared directories."""
    _unmount_below(paths.state)
    _unmount_below(paths.run)
    machine.remove_network()
    _remove_leftovers(paths)


def _unmount_below(directory: Path) -> None:
    """Unmount everything at or below a directory, the newest mount first."""
    for mount in reversed(_mounts_below(directory)):
        if not succeeds(["umount", mount]):
            run(["umount", "--lazy", mount])


def _mounts_below(directory: Path) -> list[Path]:
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount = Path(line.split()[4].encode().decode("unicode_escape"))
        if mount == directory or directory in mount.parents:
            mounts.append(mount)
    return mounts


def _remove(directory: Path) -> None:
    """Delete a directory, but never through a mount: pods have this clone's own sources mounted below it."""
    left = _mounts_below(directory)
    if left:
        raise ClusterError(f"{directory} is not removed since these mounts are below it: {', '.join(map(str, left))}")
    if directory.exists():
        shutil.rmtree(directory)


def _remove_leftovers(paths: Layout) -> None:
    for result in _entries(_CNI_RESULTS):
        if str(paths.run) in result.read_text():  # it names the pod's network namespace
            result.unlink()
    for link in _entries(_CONTAINER_LOGS):
        if link.is_symlink() and paths.state in link.readlink().parents:
            link.unlink()
    listening = Path("/proc/net/unix").read_text()
    for socket in _entries(_SHIM_SOCKETS):
        if str(socket) not in listening:
            socket.unlink()
    for directory in (_CNI_RESULTS, _SHIM_SOCKETS, _CONTAINER_LOGS):
        if directory.is_dir() and not _entries(directory):
            directory.rmdir()


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
