"""What a finished run took reaches the status, and the plans of the jobs that follow."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from qlora_operator.api import PermanentApiError, TemporaryApiError
from qlora_operator.experience import CONFIG_MAP, REREAD_SECONDS, Experience
from qlora_vram.observations import LIMIT, Observation, Observations
from qlorajob.errors import ExitCode
from qlorajob.plan import Plan
from qlorajob.status import Phase
from tests.support import gpus
from tests.support.reports import LLAMA_7B, failure, train_report
from tests.unit.operator.world import START, World, qlorajob

L4: dict[str, Any] = {
    "resources": {"gpuClass": "L4"},
    "training": {"microBatchSize": 1, "gradientCheckpointing": True, "maxSequenceLength": 512},
}


def planned(observations: Observations | None = None, spec: dict[str, Any] = L4) -> World:
    """A world whose run has been planned on a GPU."""
    world = World(qlorajob(spec), fleet=gpus.fleet(gpus.whole("a", "NVIDIA-L4")))
    world.observations = observations or world.observations
    world.prepare(facts=LLAMA_7B)
    return world


def plan_of(world: World) -> Plan:
    plan = world.status.plan
    assert plan is not None
    return plan


def after(off: float, spec: dict[str, Any] = L4) -> World:
    """A world whose run took `off` (a share) more than its plan said."""
    world = planned(spec=spec)
    world.train(peak_bytes=int(plan_of(world).predicted_peak_bytes * (1 + off)))
    return world


def physical(plan: Plan) -> int:
    return sum(size for name, size in plan.breakdown.items() if name not in ("slack", "context", "observed"))


@pytest.mark.parametrize("off", [0.1, -0.03])
def test_the_next_plan_of_the_shape_is_within_two_percent_of_what_was_measured(off: float) -> None:
    world = after(off)
    memory = world.status.memory
    assert memory is not None
    assert memory.peak_bytes is not None
    following = plan_of(planned(world.observations))
    assert abs(following.predicted_peak_bytes / memory.peak_bytes - 1) < 0.02
    shapes = [(plan.micro_batch_size, plan.checkpointing, plan.cache_weights) for plan in (plan_of(world), following)]
    assert shapes[0] == shapes[1]
    assert following.breakdown["observed"] > 0


def test_a_bogus_peak_cannot_make_a_plan_smaller_than_its_tensors() -> None:
    world = after(-0.999)
    assert len(world.observations.entries) == 1
    following = plan_of(planned(world.observations))
    assert following.predicted_peak_bytes >= physical(following)
    assert physical(following) == physical(plan_of(world))


def test_peak_and_speed_are_in_the_status() -> None:
    memory = after(0.1).status.memory
    assert memory is not None
    assert memory.tokens_per_second == 1234.5
    assert memory.predicted_bytes


def test_a_run_with_unsloth_teaches_nothing_but_is_in_the_status() -> None:
    world = after(-0.15, L4 | {"training": {**L4["training"], "backend": "unsloth"}})
    assert world.observations.entries == {}
    assert world.status.memory is not None
    assert world.status.memory.peak_bytes


@pytest.mark.parametrize(("less", "learnt"), [(0, 1), (10**9, 0)])
def test_a_run_that_had_less_memory_than_was_planned_with_teaches_nothing(less: int, learnt: int) -> None:
    """The trainer went down the ladder by itself: what it took says nothing about the plan's cut."""
    world = planned()
    predicted = plan_of(world).predicted_peak_bytes - less
    world.train(peak_bytes=predicted, predicted_bytes=predicted)
    assert len(world.observations.entries) == learnt
    assert world.status.memory is not None
    assert world.status.memory.predicted_bytes == predicted


def test_a_run_without_a_gpu_teaches_nothing() -> None:
    world = World()
    world.prepare()
    world.train()
    assert world.observations.entries == {}


def test_a_crash_before_the_status_is_written_tells_the_same_again() -> None:
    world = planned()
    world.run()
    world.look()
    world.end("train", 0, train_report(peak_bytes=7 * 10**9))
    first = world.look(record=False).observations
    assert len(first) == 1
    assert world.look().observations == first
    assert world.look().observations == ()


def test_a_run_that_goes_on_from_another_plans_checkpoint_teaches_nothing() -> None:
    world = planned()
    world.run()
    world.look()
    world.end("train", ExitCode.INVALID, failure("train", ExitCode.INVALID, "DatasetInvalid", "bad row"))
    world.look()
    world.edit({"backoffLimit": 1})
    world.prepare(facts=LLAMA_7B)
    world.train(peak_bytes=20 * 10**9)
    assert world.status.run is not None
    assert world.status.run.attempt == 2
    assert world.observations.entries == {}


def test_a_run_that_was_out_of_memory_teaches_that_and_the_attempt_after_it_nothing() -> None:
    world = planned(spec={"resources": {"gpuClass": "L4"}, "training": {"maxSequenceLength": 512}})
    world.run()
    world.look()
    world.end("train", ExitCode.OUT_OF_MEMORY)
    world.look()
    (seen,) = world.observations.entries.values()
    assert (seen.out_of_memory, seen.tokens_per_second) == (True, None)
    world.train(peak_bytes=20 * 10**9)
    assert world.status.phase is Phase.SUCCEEDED
    assert list(world.observations.entries.values()) == [seen]


# The ConfigMap


class ConfigMaps:
    """A ConfigMap on an API server, with merge patches."""

    def __init__(self) -> None:
        self.data: dict[str, str] = {}
        self.reads = 0
        self.error: Exception | None = None

    async def config_map(self, namespace: str, name: str) -> Mapping[str, str]:
        self.reads += 1
        return self._answer(namespace, name)

    async def patch_config_map(self, namespace: str, name: str, data: Mapping[str, str | None]) -> Mapping[str, str]:
        self._answer(namespace, name)
        self.data = {key: text for key, text in (self.data | dict(data)).items() if text is not None}
        return self._answer(namespace, name)

    def _answer(self, namespace: str, name: str) -> dict[str, str]:
        if self.error:
            raise self.error
        assert (namespace, name) == ("system", CONFIG_MAP)
        return dict(self.data)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def experience(config_maps: ConfigMaps, clock: Clock | None = None, namespace: str | None = "system") -> Experience:
    return Experience(config_maps, namespace, "trainer:1", clock or Clock())


def observation(number: int = 0) -> Observation:
    (run,) = after(0.1).observations.entries.values()
    return run.model_copy(update={"trainer": "trainer:1"} | _changes(number))


def _changes(number: int) -> dict[str, Any]:
    return {"rank": number + 1, "at": START + timedelta(seconds=number)}


async def test_what_was_learned_outlives_the_operator() -> None:
    config_maps, run = ConfigMaps(), observation()
    await experience(config_maps).add(run)
    assert (await experience(config_maps).known()).entries == {run.key: run}


async def test_two_operators_do_not_overwrite_each_other() -> None:
    config_maps, clock = ConfigMaps(), Clock()
    one, other = experience(config_maps, clock), experience(config_maps, clock)
    assert (await one.known()) == (await other.known())
    await one.add(observation(1))
    await other.add(observation(2))
    assert len(config_maps.data) == 2
    clock.now += REREAD_SECONDS
    assert (await one.known()) == (await other.known())


async def test_the_config_map_stays_bounded_and_what_others_keep_there_stays() -> None:
    config_maps, first = ConfigMaps(), observation()
    config_maps.data["note"] = "hands off"
    runs = [first.model_copy(update=_changes(n)) for n in range(LIMIT + 3)]
    mine = experience(config_maps)
    for run in runs:
        await mine.add(run)
    assert set(config_maps.data) == {"note", *(run.key for run in runs[3:])}
    assert sum(map(len, config_maps.data.values())) < 200_000


async def test_it_is_read_once_in_a_while_and_not_at_each_look() -> None:
    config_maps, clock = ConfigMaps(), Clock()
    mine = experience(config_maps, clock)
    for _ in range(3):
        await mine.known()
    assert config_maps.reads == 1
    clock.now += REREAD_SECONDS
    await mine.known()
    assert config_maps.reads == 2


@pytest.mark.parametrize("error", [TemporaryApiError("down"), PermanentApiError("forbidden", 403)])
async def test_an_api_server_that_refuses_is_logged_and_harms_nothing(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    config_maps, run = ConfigMaps(), observation()
    config_maps.error = error
    mine = experience(config_maps)
    assert (await mine.known()).entries == {}
    await mine.add(run)
    assert (await mine.known()).entries == {run.key: run}
    assert len([record for record in caplog.records if str(error) in record.message]) == 2


async def test_an_operator_that_is_not_to_learn_makes_no_request() -> None:
    config_maps = ConfigMaps()
    mine = experience(config_maps, namespace=None)
    await mine.add(observation())
    assert (await mine.known()).entries == {}
    assert (config_maps.reads, config_maps.data) == (0, {})
