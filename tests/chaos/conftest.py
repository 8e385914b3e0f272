"""Cells of the fault matrix, each with a job and an S3 endpoint of its own; docs/reliability.md lists them.

Cells marked `long` run in `make test-chaos`, the others in `make test` too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

import weights
from cluster.layout import NODE_ADDRESS
from qlorajob.manifest import MANIFEST
from tests.chaos.cell import BUCKET, Cell
from tests.chaos.faults import Faults
from tests.chaos.history import History, Json
from tests.chaos.ledger import LEDGER
from tests.conftest import fresh_namespace
from tests.support import tiny
from tests.support.faulty_s3 import FaultyS3, in_front_of
from tests.support.live import Cluster, Namespace, empty_bucket

HERE = "tests/chaos/"
WIDTH = 128
"""Of the tiny model: its merged weights take two parts of a multipart upload."""


@pytest.fixture(scope="session")
def s3(cluster: Cluster) -> Any:
    """A client of the real S3 server, which no fault touches; with a model and data in a bucket of these tests."""
    return empty_bucket(cluster, BUCKET)


@pytest.fixture(scope="session")
def inputs(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """s3://chaos/model and s3://chaos/data."""
    directory: Path = tmp_path_factory.mktemp("tiny-model")
    tiny.write_model(directory, weights.default_destination(), width=WIDTH)
    for file in directory.iterdir():
        s3.upload_file(str(file), BUCKET, f"model/{file.name}")
    s3.put_object(Bucket=BUCKET, Key="data/rows.jsonl", Body=tiny.jsonl())


@pytest.fixture(scope="package")
def namespace(cluster: Cluster) -> Iterator[Namespace]:
    """One for all cells: each cleans up after itself."""
    with fresh_namespace(cluster, "test-chaos") as made:
        yield made
        target = ("-n", cluster.target.operator_namespace, "deployment/qlora-operator")
        cluster.kubectl("rollout", "status", *target, "--timeout=120s")


@pytest.fixture(scope="package")
def history(namespace: Namespace, s3: Any) -> Iterator[History]:
    """The witness."""

    def is_published(job: Json) -> bool:
        bucket, _, prefix = job["spec"]["output"]["uri"].removeprefix("s3://").partition("/")
        key = f"{prefix}/{job['status']['run']['id']}/{MANIFEST}"
        return bool(s3.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents"))

    with History(namespace, is_published) as running:
        yield running


@pytest.fixture
def storage(cluster: Cluster) -> Iterator[FaultyS3]:
    """The S3 endpoint of a cell's job."""
    with in_front_of(cluster.target.host_endpoint, host=NODE_ADDRESS) as proxy:
        yield proxy


@pytest.fixture
def cell(
    namespace: Namespace, history: History, s3: Any, inputs: None, storage: FaultyS3, request: pytest.FixtureRequest
) -> Iterator[Cell]:
    """The job of this test; not started yet."""
    words = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    made = Cell(namespace, history, s3, storage, words[:50].rstrip("-"))
    yield made
    namespace.kubectl("delete", "qlj", made.name, "--ignore-not-found", "--wait=false")


@pytest.fixture
def faults(cluster: Cluster, namespace: Namespace) -> Faults:
    """What can be done to the cluster."""
    return Faults(cluster, namespace)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Find out whether every cell that was run held."""
    ours = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    LEDGER.held = not any(report.nodeid.startswith(HERE) for report in ours)


def pytest_unconfigure() -> None:
    """The last line of all."""
    if LEDGER.held and LEDGER.faults:
        print(LEDGER.line())
