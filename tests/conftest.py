"""Fixtures of every test: the real local cluster. `make test` starts it; its absence is an error, never a skip."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
import pytest

from cluster import environment, templates
from demo.target import find
from tests.support.live import Cluster, Namespace, write_s3_secret

# Threads that have nothing to do sleep, as in the trainer's pods: there are more processes here than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How fast an example is made depends on what else the machine does: no property is about that.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let processes share the work file by file, so that a module's fixtures are made once.

    What uses the local cluster stays together, as does what uses the handler tests' API server. These come first: they
    wait for most of their time.
    """
    first = ("cluster", "handlers")
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: first.index(groups[item]) if groups[item] in first else len(first))


def _group(item: pytest.Item) -> str:
    if "cluster" in getattr(item, "fixturenames", ()):
        return "handlers" if "handlers" in item.path.parts else "cluster"
    return item.path.stem


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The local cluster with the operator installed."""
    os.environ.pop("KUBECONFIG", None)
    return Cluster(find())


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """A fresh namespace for this module, enforcing the restricted Pod Security Standard.

    Deleted afterwards, with its pods gone before the next module starts: they would take the node's CPU from it.
    """
    stem = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    with fresh_namespace(cluster, f"test-{re.sub('[^a-z0-9]+', '-', stem.lower())}") as made:
        yield made


@contextmanager
def fresh_namespace(cluster: Cluster, name: str) -> Iterator[Namespace]:
    """A namespace as the fixture's, for as long as the block lasts."""
    paths = cluster.layout
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait")
    cluster.kubectl("delete", "pv", f"qlora-env-{name}", "--ignore-not-found")
    cluster.kubectl(
        *("apply", "--server-side", "-f", "-"),
        input_text=templates.render(paths, "manifests/namespaces.yaml", namespace=name),
    )
    environment.claim(paths, name)
    made = Namespace(cluster, name)
    write_s3_secret(made)
    yield made
    cluster.kubectl("delete", "namespace", name, "--wait")
    cluster.kubectl("delete", "pv", f"qlora-env-{name}")
