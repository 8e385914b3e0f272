"""Argo CD's health of a QLoRAJob: the Lua that docs/gitops ships, run on statuses that reconcile wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lupa.lua51 import LuaRuntime  # the version that Argo CD's interpreter speaks
from ruamel.yaml import YAML

from qlorajob.errors import ExitCode, Reason
from tests.support.reports import failure
from tests.unit.operator.world import World, qlorajob, trained, training

CONFIG_MAP = Path(__file__).parents[3] / "docs" / "gitops" / "argocd-cm.yaml"
KEY = "resource.customizations.health.qlora.dev_QLoRAJob"


def health(resource: dict[str, Any]) -> tuple[str, str]:
    """What Argo CD would show: status and message."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = lua.table_from(resource, recursive=True)
    answer = lua.execute(YAML(typ="safe").load(CONFIG_MAP)["data"][KEY])
    return answer["status"], answer["message"]


def health_of(world: World) -> tuple[str, str]:
    return health({"metadata": {"generation": world.job.metadata.generation}, "status": world.status.to_wire()})


def failed() -> World:
    world = World()
    world.look()
    report = failure("prepare", ExitCode.INVALID, Reason.DATASET_INVALID, "dataset.uri: it is empty", "dataset.uri")
    world.end("prepare", ExitCode.INVALID, report)
    world.look()
    return world


def suspended() -> World:
    world = World(qlorajob({"suspend": True}))
    world.look()
    return world


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        pytest.param(trained, "Healthy", id="complete"),
        pytest.param(training, "Progressing", id="training"),
        pytest.param(failed, "Degraded", id="failed"),
        pytest.param(suspended, "Suspended", id="suspended"),
    ],
)
def test_argo_cd_sees(world: Any, expected: str) -> None:
    assert health_of(world())[0] == expected


def test_a_degraded_job_shows_what_to_do() -> None:
    assert "dataset.uri: it is empty" in health_of(failed())[1]


def test_a_job_that_no_operator_has_seen_is_progressing() -> None:
    assert health({"metadata": {"generation": 1}, "status": {"observedGeneration": -1}})[0] == "Progressing"
    assert health({"metadata": {"generation": 1}})[0] == "Progressing"


def test_an_edit_makes_a_finished_job_progress_again() -> None:
    world = trained()
    assert health({"metadata": {"generation": 2}, "status": world.status.to_wire()})[0] == "Progressing"
