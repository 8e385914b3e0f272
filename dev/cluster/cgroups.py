"""The control group that holds every process of the cluster, on cgroup v1, hybrid and v2 machines."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from cluster.layout import CGROUP
from cluster.shell import ClusterError, wait_until

_ROOT = Path("/sys/fs/cgroup")
# Of cgroup v1's controllers, the ones that daemons join: no other puts a limit on them, and each costs a little.
_DAEMON_CONTROLLERS = ("memory", "pids", "freezer")


def _hierarchies() -> list[Path]:
    """The mounted hierarchies: one on cgroup v2, one per controller on v1, and both kinds on a hybrid machine."""
    if not _ROOT.is_dir():
        return []
    if (_ROOT / "cgroup.procs").exists():
        return [_ROOT]
    mounted = (path for path in sorted(_ROOT.iterdir()) if not path.is_symlink())
    return [path for path in mounted if (path / "cgroup.procs").exists()]


def make() -> None:
    """Make the cluster's group in every hierarchy; the kubelet puts the pods' groups below it."""
    for hierarchy in _hierarchies():
        group = hierarchy / CGROUP
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # v1's cpuset takes nobody in before these are set
            if (group / setting).exists() and not (group / setting).read_text().strip():
                (group / setting).write_text((hierarchy / setting).read_text())
        if (group / "cpu.shares").exists():  # as much of a busy machine as one busy process per core would get
            (group / "cpu.shares").write_text(str(1024 * (os.cpu_count() or 1)))


def join(pid: int) -> None:
    """Move a daemon to the cluster's group.

    A daemon must leave the group of the shell that started it, too: that one may be ended as a whole.
    """
    for hierarchy in _hierarchies():
        if hierarchy == _ROOT or hierarchy.name in _DAEMON_CONTROLLERS:
            group = hierarchy / CGROUP / "system"
            group.mkdir(parents=True, exist_ok=True)
            (group / "cgroup.procs").write_text(str(pid))


def _all_groups() -> Iterator[Path]:
    """Every group of the cluster in any hierarchy, the innermost first."""
    for hierarchy in _hierarchies():
        for directory, _, _ in os.walk(hierarchy / CGROUP, topdown=False):
            yield Path(directory)


def processes() -> set[int]:
    """The ids of all the processes of the cluster: daemons, shims and containers."""
    found: set[int] = set()
    for group in _all_groups():
        try:
            found.update(int(pid) for pid in (group / "cgroup.procs").read_text().split())
        except (FileNotFoundError, OSError):
            continue  # the group went away meanwhile
    return found


def end_all() -> None:
    """Kill whatever is left in the cluster's groups, and remove the groups."""

    def ended() -> bool:
        left = processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not left

    wait_until(ended, 30, lambda: f"these processes can't be ended: {sorted(processes())}")

    def removed() -> bool:
        for group in list(_all_groups()):
            try:
                group.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    try:
        wait_until(removed, 10, lambda: "control groups are still busy")
    except ClusterError:
        return  # an empty group costs nothing, and the next `up` uses it again
