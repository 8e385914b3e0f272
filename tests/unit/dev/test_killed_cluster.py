"""A cluster that was killed instead of stopped doesn't stand in the next one's way."""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cgroups, layout, machine, teardown
from cluster.layout import Layout
from cluster.shell import run

_CLONE_NEWNET = 0x40000000

needs_network = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nft") is None, reason="making interfaces needs root and nftables"
)


@pytest.fixture
def own_network() -> Iterator[None]:
    """A network namespace for this test's thread, so that the machine's real cluster is out of reach."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before:
        assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def remains(own_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    """Another clone's record, its bridge with a pod's interface, and a pod's mount."""
    monkeypatch.setattr(machine, "_RECORD", tmp_path / "record.json")
    clone = Layout(tmp_path / "other-clone")
    machine.claim(clone)
    machine.prepare_network()
    run(["ip", "link", "add", "vethpod", "master", layout.BRIDGE, "type", "veth", "peer", "name", "eth0"])
    volume = clone.state / "kubelet" / "volume"
    volume.mkdir(parents=True)
    run(["mount", "-t", "tmpfs", "tmpfs", str(volume)])
    yield clone
    if volume.is_mount():
        run(["umount", str(volume)])


def _interfaces() -> set[str]:
    return {link["ifname"] for link in json.loads(run(["ip", "-json", "link", "show"]))}


@needs_network
def test_what_a_killed_cluster_held_is_released_and_its_files_stay(
    remains: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "processes", set)
    teardown.release_killed()
    assert _interfaces().isdisjoint({"vethpod", "eth0", layout.BRIDGE})
    assert "qlora-operator" not in run(["nft", "list", "tables"])
    assert not (remains.state / "kubelet" / "volume").is_mount()
    assert (remains.state / "kubelet").is_dir()
    assert machine.owner() is None


@needs_network
def test_a_cluster_that_runs_is_left_alone(remains: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "processes", lambda: {os.getpid()})
    teardown.release_killed()
    assert {"vethpod", layout.BRIDGE} <= _interfaces()
    assert (remains.state / "kubelet" / "volume").is_mount()
    assert machine.owner() == remains.repository


def test_a_first_start_that_ended_before_its_tools_were_installed_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_RECORD", tmp_path / "record.json")
    monkeypatch.setattr(cgroups, "processes", set)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.claim(Layout(tmp_path / "clone"))
    teardown.release_killed()
    assert machine.owner() is None
