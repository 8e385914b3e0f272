"""Fixtures of every test: the real local cluster. `make test` starts it; its absence is an error, never a skip."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from cluster import environment, templates
from demo.target import find
from tests.support.live import Cluster, Namespace, write_s3_secret

# Threads that have nothing to do sleep, as in the trainer's pods: there are more processes here than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How fast an example is made depends on what else the machine does: no property is about that.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

GROUPS = {"tests/chaos/": "cluster", "tests/e2e/": "cluster", "tests/handlers/": "handlers"}
"""Folders whose tests share something that only one of them can use at a time."""


class ByResource(LoadScopeScheduling):  # type: ignore[misc]
    """Processes share the tests file by file. What uses the one cluster, or the one API server, stays together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((group for folder, group in GROUPS.items() if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByResource:
    """Of `--numprocesses`."""
    return ByResource(config, log)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The local cluster with the operator installed."""
    os.environ.pop("KUBECONFIG", None)
    return Cluster(find())


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """A fresh namespace for this module, enforcing the restricted Pod Security Standard.

    Deleted afterwards, with its pods gone before the next module starts: they would take the node's CPU from it. Nobody
    waits for the rest of it, but who makes one of the same name.
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
    # Live pods first: a namespace that has any when it is deleted waits for half of their grace period, a minute.
    made.kubectl("delete", "qlorajobs,jobs", "--all", "--wait")
    made.kubectl("wait", "pods", "--all", "--for=delete", "--timeout=180s")
    cluster.kubectl("delete", f"namespace/{name}", f"pv/qlora-env-{name}", "--wait=false")
