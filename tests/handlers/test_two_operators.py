"""Two operators, as in a rolling update or with replicaCount 2: one acts, and when it ends the other does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from qlorajob.errors import ExitCode
from qlorajob.identity import prepare_key
from qlorajob.resource import parse
from tests.handlers.conftest import RELEASE
from tests.handlers.stage import Json, OperatorProcess, Stage
from tests.support.reports import prepare_report, train_report

STARTS_OPERATOR = False
LEASE = f"{RELEASE}-qlora-operator"


@pytest.fixture
def operators(stage: Stage) -> Iterator[tuple[OperatorProcess, OperatorProcess]]:
    """Two of them, not started. The first that is started leads."""
    stage.kubectl("delete", "lease", LEASE, "--ignore-not-found")
    base = stage.operator
    logs = [base.log.with_name(f"operator-{number}.log") for number in (0, 1)]
    pair = tuple(replace(base, number=number, lease=LEASE, log=log) for number, log in enumerate(logs))
    for log in logs:
        log.write_text("")
    yield pair[0], pair[1]
    for operator in pair:
        operator.stop()


def lease(stage: Stage) -> Json:
    """What the Lease says; nothing where there is none."""
    found = stage.cluster.try_kubectl("-n", stage.name, "get", "lease", LEASE)
    spec: Json = stage.get("lease", LEASE)["spec"] if found.returncode == 0 else {}
    return spec


def start(stage: Stage, leader: OperatorProcess, standby: OperatorProcess) -> None:
    leader.start()
    stage.until(lambda: lease(stage).get("holderIdentity") == leader.identity, "the first operator leads")
    standby.start()
    stage.until(standby.healthy, "the second operator stands by")


def leads(operator: OperatorProcess) -> bool:
    return "qlora_operator_leader 1.0" in operator.metrics()


def began(operator: OperatorProcess) -> bool:
    """It has made a Job."""
    return "created Job" in operator.log.read_text()


def prepare(stage: Stage, name: str) -> None:
    key = prepare_key(parse(stage.get("qlj", name)).spec)
    stage.finish(stage.pod(name, "prepare"), prepare_report(key, name))


def test_the_standby_takes_over_from_a_leader_that_is_killed(
    stage: Stage, operators: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, standby = operators
    start(stage, leader, standby)
    stage.apply("killed")
    prepare(stage, "killed")
    pod = stage.pod("killed", "train")
    stage.run(pod)
    stage.phase("killed", "Training")
    assert (leads(leader), leads(standby)) == (True, False)
    assert 'qlora_jobs{namespace="' not in standby.metrics()
    assert (began(leader), began(standby)) == (True, False)
    leader.kill()
    stage.finish(pod, train_report("killed"))
    stage.phase("killed", "Succeeded")
    assert leads(standby)
    assert lease(stage)["holderIdentity"] == standby.identity
    assert lease(stage)["leaseTransitions"] == 1
    assert [len(stage.jobs("killed", step)) for step in ("prepare", "train")] == [1, 1]
    assert stage.events("killed").count("Succeeded") == 1


def test_a_leader_that_is_stopped_releases_the_lease_at_once(
    stage: Stage, operators: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, standby = operators
    start(stage, leader, standby)
    leader.stop()
    assert lease(stage).get("holderIdentity", "") in ("", standby.identity)
    stage.until(lambda: leads(standby), "the second operator leads")
    stage.apply("rolled")
    prepare(stage, "rolled")
    assert began(standby)


def test_both_begin_at_once_and_one_acts(stage: Stage, operators: tuple[OperatorProcess, OperatorProcess]) -> None:
    for operator in operators:
        operator.start()
    for operator in operators:
        stage.until(operator.healthy, "both are healthy")
    stage.until(lambda: any(leads(operator) for operator in operators), "one leads")
    for number in range(3):
        stage.apply(f"both-{number}")
    for number in range(3):
        stage.end(stage.pod(f"both-{number}", "prepare"), int(ExitCode.INVALID))
        stage.phase(f"both-{number}", "Failed")
        assert len(stage.jobs(f"both-{number}", "prepare")) == 1
    assert sorted(map(leads, operators)) == [False, True]
    assert sorted(map(began, operators)) == [False, True]
