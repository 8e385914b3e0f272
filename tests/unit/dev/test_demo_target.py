"""`make demo` runs on the local cluster, or with the user's own tools on the cluster that KUBECONFIG names."""

from pathlib import Path

import pytest

from cluster.shell import ClusterError
from demo import target

_SETTINGS = {name: name.lower() for name in target.OWN_CLUSTER_VARIABLES}


@pytest.fixture
def own_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kubeconfig of the user's in the home directory, and nothing on the PATH."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("KUBECONFIG", "~/config")  # as zsh and sh hand it on
    for name, value in _SETTINGS.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "config"


def test_the_users_kubectl_talks_to_the_users_cluster(own_cluster: Path, tmp_path: Path) -> None:
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text('#!/bin/sh\necho "mine: $*"\n')
    kubectl.chmod(0o755)
    assert target.find().kubectl("get", "nodes") == f"mine: --kubeconfig={own_cluster} get nodes\n"


def test_a_missing_tool_is_named(own_cluster: Path) -> None:
    with pytest.raises(ClusterError, match=f"helm is not installed.*{own_cluster}"):
        target.find().helm("list")


@pytest.mark.parametrize("name", _SETTINGS)
def test_a_missing_setting_is_named(own_cluster: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(ClusterError, match=rf"{own_cluster}, set {name}:"):
        target.find()
