"""What trainer pods report beside their result: warnings become events, upload times the next pods' grace period."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import cache
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.grace import MAX_SECONDS, REST_SECONDS, SLOWEST_BYTES_A_SECOND, expected_bytes, grace_seconds
from qlorajob.errors import ExitCode, Reason
from qlorajob.plan import Plan
from qlorajob.run import WARNINGS, RunReport
from qlorajob.status import Progress, SavedCheckpoint
from tests.support import gpus
from tests.support.reports import LLAMA_7B, failure, train_report
from tests.unit.operator.world import World, qlorajob, training

SKIPPED = "checkpoint of step 40 is skipped: optimizer.pt is missing"


# Warnings


def warned(report: RunReport, *texts: str) -> RunReport:
    return report.model_copy(update={"warnings": texts or (SKIPPED,)})


def interrupted(*texts: str) -> RunReport:
    return warned(failure("train", ExitCode.INTERRUPTED, Reason.INTERRUPTED, "checkpoint 12"), *texts)


def warnings(world: World) -> list[str]:
    return [event.message for event in world.events if event.reason == "TrainerWarning"]


def test_a_finished_run_tells_what_went_wrong_on_the_way_once() -> None:
    world = training()
    name = world.pod("train").name
    world.end("train", 0, warned(train_report()))
    for _ in range(3):
        world.look()
    assert warnings(world) == [f"train, pod {name}: {SKIPPED}"]
    assert {event.type for event in world.events if event.reason == "TrainerWarning"} == {"Warning"}


def test_each_pod_of_a_job_tells_its_own_once() -> None:
    world = training()
    for number in range(3):
        world.now += timedelta(minutes=1)
        world.end("train", ExitCode.INTERRUPTED, interrupted(f"number {number}"))
        world.look()
        world.look()
        world.add_pod(next(iter(world.live("train"))))
        world.run()
        world.look()
    assert [message[-8:] for message in warnings(world)] == ["number 0", "number 1", "number 2"]


def test_an_operator_that_dies_before_it_writes_the_status_tells_it_when_it_is_back() -> None:
    world = training()
    world.end("train", ExitCode.INTERRUPTED, interrupted())
    world.look(record=False)
    world.look()
    world.look()
    assert len(warnings(world)) == 1


def test_a_failure_tells_its_warnings_too() -> None:
    world = training()
    world.end("train", 64, warned(failure("train", ExitCode.INVALID, Reason.DATASET_INVALID, "bad row")))
    world.look()
    world.look()
    assert len(warnings(world)) == 1


def test_warnings_are_bounded_in_number() -> None:
    world = training()
    world.end("train", ExitCode.INTERRUPTED, interrupted(*(f"number {n}" for n in range(50))))
    world.look()
    assert len(warnings(world)) == WARNINGS
    assert warnings(world)[-1].endswith("number 49")


def test_a_predecessor_of_the_same_name_is_not_told_of() -> None:
    old = training()
    old.end("train", ExitCode.INTERRUPTED, interrupted())
    world = World(qlorajob(uid="u2"), jobs=old.jobs, pods=old.pods, now=old.now)
    world.look()
    assert warnings(world) == []


# The grace period


def saved(seconds: float) -> Progress:
    return Progress(step=10, total_steps=60, checkpoint=SavedCheckpoint(step=10, bytes=1, seconds=seconds))


def template(world: World) -> dict[str, Any]:
    spec: dict[str, Any] = world.manifests[world.status.job or ""]["spec"]["template"]["spec"]
    return spec


def grace(world: World) -> int:
    """Of the current Job's pods; they are told the same number."""
    pod = template(world)
    value = next(item["value"] for item in pod["containers"][0]["env"] if item["name"] == "QLORA_RUN_CONFIG")
    told = json.loads(value)["graceSeconds"]
    assert told == pod["terminationGracePeriodSeconds"]
    return int(told)


def again(world: World) -> None:
    """Another Job for the same run."""
    for suspend in (True, False):
        world.edit({"suspend": suspend})
        world.look()
        world.collect()
    world.look()


def test_a_small_checkpoint_leaves_the_administrators_setting() -> None:
    assert grace(training()) == 120


def test_a_slow_upload_gives_the_next_job_more_time() -> None:
    world = training()
    world.run(progress=saved(200.2))
    world.look()
    again(world)
    assert grace(world) == 401 + REST_SECONDS


def test_an_attempt_without_a_checkpoint_of_its_own_does_not_forget_how_long_they_take() -> None:
    world = training()
    world.run(progress=saved(200))
    world.look()
    again(world)
    world.run(progress=Progress(step=11, total_steps=60))
    world.look()
    again(world)
    assert grace(world) == 400 + REST_SECONDS


def test_a_large_adapter_has_time_before_anything_is_measured() -> None:
    spec = {"resources": {"gpuClass": "auto"}, "lora": {"rank": 256}, "training": {"optimizer": "adamw_torch"}}
    world = World(qlorajob(spec), fleet=gpus.fleet(gpus.whole("a", "NVIDIA-A100-SXM4-80GB")))
    world.prepare(facts=LLAMA_7B)
    plan = world.status.plan
    assert plan is not None
    weights = 4 * 256 * sum((layer.inputs + layer.outputs) * layer.count for layer in LLAMA_7B.linears)
    assert expected_bytes(plan) >= 3 * weights  # Adam holds two numbers for each
    assert grace(world) >= 6 * weights // SLOWEST_BYTES_A_SECOND


def test_other_steps_have_the_administrators_setting() -> None:
    world = World()
    world.look()
    assert grace(world) == 120


@cache
def plan() -> Plan:
    found = training().status.plan
    assert found is not None
    return found


@given(
    st.integers(1, 10_000),
    st.integers(0, 10**13),
    st.none() | st.floats(0, 10**6, allow_nan=False),
    st.integers(0, 60),
    st.none() | st.integers(0, 10**6),
)
def test_the_grace_period_is_bounded_on_both_sides(
    least: int, size: int, seconds: float | None, step: int, eta: int | None
) -> None:
    progress = None
    if seconds is not None:
        progress = saved(seconds).model_copy(update={"step": step, "eta_seconds": eta})
    planned = plan().model_copy(update={"breakdown": {"adapter": size}})
    assert least <= grace_seconds(least, planned, progress) <= max(least, MAX_SECONDS)
