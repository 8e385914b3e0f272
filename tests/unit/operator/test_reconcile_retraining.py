"""reconcile on edits: a new result is a new run, and the old one is kept."""

from __future__ import annotations

from qlorajob.errors import Reason
from qlorajob.status import Phase
from tests.support.reports import adapter
from tests.unit.operator.world import World, qlorajob, trained, training

MERGE = {"merge": {"enabled": True}}


# Retraining


def test_a_changed_spec_replaces_the_running_run() -> None:
    world = training()
    world.edit({"training": {"learningRate": 1e-5}})
    world.look()
    assert world.live("train") == []
    assert len(world.live("prepare")) == 1
    assert [(entry.id, entry.outcome) for entry in world.status.history] == [("run1", "Replaced")]
    assert world.status.artifacts is None
    assert world.status.progress is None


def test_a_new_run_waits_for_the_old_runs_pods() -> None:
    world = training()
    world.edit({"training": {"learningRate": 1e-5}})
    world.prepare("run2")
    assert world.live("train") == []
    assert "to stop" in world.message()
    world.collect()
    world.look()
    assert len(world.live("train")) == 1


def test_a_finished_run_goes_into_history_with_its_adapter() -> None:
    world = trained()
    world.edit({"lora": {"rank": 8}})
    world.prepare("run2")
    entry = world.status.history[0]
    assert (entry.id, entry.outcome, entry.adapter, entry.loss) == (
        "run1",
        "Succeeded",
        "s3://adapters/run1/adapter",
        0.5,
    )
    assert world.status.run is not None
    assert world.status.run.id == "run2"
    assert not {"Complete", "Finished", "Ready"} & world.true()


def test_going_back_to_an_earlier_spec_takes_it_out_of_history() -> None:
    world = trained()
    world.edit({"lora": {"rank": 8}})
    world.prepare("run2")
    world.edit({"lora": {"rank": 16}})
    world.prepare("run1", artifacts=adapter("run1"))
    assert [entry.id for entry in world.status.history] == ["run2"]
    assert world.status.phase is Phase.SUCCEEDED


def test_history_is_bounded() -> None:
    world = World()
    for number in range(14):
        world.edit({"training": {"seed": number}})
        world.collect()
        world.prepare(f"run{number}")
    assert len(world.status.history) == 10
    assert world.status.history[0].id == "run12"


def test_a_recreated_object_doesnt_touch_its_predecessors_jobs_but_waits_for_them() -> None:
    world = training()
    old = next(iter(world.live("train")))
    world.job = qlorajob(uid="u2")
    world.prepare()
    assert old.name in world.jobs
    assert [job.owner_uid for job in world.live("train")] == ["u1"]
    assert "to stop" in world.message()
    del world.jobs[old.name]
    world.collect()
    world.look()
    assert [job.owner_uid for job in world.live("train")] == ["u2"]


# The gate


def test_an_adapter_that_isnt_better_is_complete_but_not_promoted() -> None:
    world = World(qlorajob(MERGE))
    world.prepare()
    world.train(promoted=False)
    assert world.status.phase is Phase.SUCCEEDED
    assert world.condition("Promoted").status == "False"  # type: ignore[union-attr]
    assert world.reason() == Reason.NOT_BETTER_THAN_BASE
    assert world.live("merge") == []


def test_an_adapter_that_is_better_is_promoted() -> None:
    world = World()
    world.prepare()
    world.train(promoted=True)
    assert "Promoted" in world.true()


def test_a_gates_verdict_is_forgotten_with_its_run() -> None:
    world = World()
    world.prepare()
    world.train(promoted=False)
    world.edit({"lora": {"rank": 8}})
    world.look()
    assert world.condition("Promoted") is None
