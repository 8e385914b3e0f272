"""The small parts: merge patches, the store's memory of its own writes, the work queue, configuration, metrics."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_operator.config import ENV_CONFIG, OperatorConfig
from qlora_operator.decision import MAX_EVENT_MESSAGE, Event, Measurement
from qlora_operator.metrics import Metrics
from qlora_operator.patching import merge_patch
from qlora_operator.store import FORGET_AFTER, Key, Store
from qlora_operator.workqueue import WorkQueue
from qlora_vram.gpus import SHIPPED

KEY = Key("team", "x")
JSON = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7386, as the API server does it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(result.get(name), value)
    return result


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_makes_new_of_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new


@given(OBJECTS)
def test_no_change_is_no_patch(obj: dict[str, Any]) -> None:
    assert merge_patch(obj, obj) == {}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def raw(name: str, version: int = 1, uid: str = "u") -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": uid, "resourceVersion": str(version)}}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def indexes() -> tuple[dict[Key, Any], dict[Key, Any], dict[Key, Any]]:
    return {KEY: [raw("x")]}, {}, {}


@pytest.fixture
def store(indexes: tuple[dict[Key, Any], dict[Key, Any], dict[Key, Any]], clock: Clock) -> Store:
    return Store(*indexes, clock)


def test_the_store_prefers_what_it_wrote_to_an_older_index(store: Store) -> None:
    store.wrote_qlorajob(KEY, raw("x", 2))
    assert store.qlorajob(KEY) == raw("x", 2)


def test_the_store_prefers_a_newer_index(store: Store, indexes: Any) -> None:
    store.wrote_qlorajob(KEY, raw("x", 2))
    indexes[0][KEY] = [raw("x", 10)]
    assert store.qlorajob(KEY) == raw("x", 10)


def test_the_store_forgets_a_deleted_object(store: Store, indexes: Any) -> None:
    store.wrote_qlorajob(KEY, raw("x", 2))
    del indexes[0][KEY]
    assert store.qlorajob(KEY) is None


def test_the_store_never_mixes_up_an_object_and_its_successor(store: Store, indexes: Any) -> None:
    store.wrote_qlorajob(KEY, raw("x", 20))
    indexes[0][KEY] = [raw("x", 3, uid="new")]
    assert store.qlorajob(KEY) == raw("x", 3, uid="new")


def test_a_created_job_is_there_before_the_index_shows_it(store: Store) -> None:
    store.created_job(KEY, raw("job"))
    assert store.jobs(KEY) == [raw("job")]


def test_a_created_job_that_came_and_went_is_forgotten(store: Store, clock: Clock) -> None:
    store.created_job(KEY, raw("job"))
    clock.now = FORGET_AFTER
    assert store.jobs(KEY) == []


def test_a_deleted_job_is_marked_until_the_index_drops_it(store: Store, indexes: Any) -> None:
    indexes[1][KEY] = [raw("job", uid="j")]
    store.deleted_job(KEY, "j")
    assert "deletionTimestamp" in store.jobs(KEY)[0]["metadata"]


async def _drive(queue: WorkQueue[str], seconds: float = 0.3) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(queue.run(), seconds)


async def test_many_adds_are_one_look() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        seen.append(key)

    queue = WorkQueue(work)
    for _ in range(5):
        queue.add("a")
    await _drive(queue)
    assert seen == ["a"]


async def test_a_key_added_while_it_is_worked_on_comes_back_once_and_never_in_parallel() -> None:
    running, seen = 0, 0

    async def work(key: str) -> None:
        nonlocal running, seen
        running, seen = running + 1, seen + 1
        assert running == 1
        if seen == 1:
            queue.add(key)
            queue.add(key)
        await asyncio.sleep(0.01)
        running -= 1

    queue = WorkQueue(work)
    queue.add("a")
    await _drive(queue)
    assert seen == 2


async def test_different_keys_run_in_parallel() -> None:
    both = asyncio.Barrier(2)
    done: list[str] = []

    async def work(key: str) -> None:
        await both.wait()
        done.append(key)

    queue = WorkQueue(work)
    queue.add("a")
    queue.add("b")
    await _drive(queue)
    assert sorted(done) == ["a", "b"]


async def test_a_failed_key_is_tried_again_and_the_others_go_on() -> None:
    seen: list[str] = []

    async def work(key: str) -> None:
        seen.append(key)
        if key == "bad" and seen.count("bad") < 3:
            raise RuntimeError("no")

    queue = WorkQueue(work, workers=1, backoff_seconds=0.01)
    queue.add("bad")
    queue.add("good")
    await _drive(queue, 0.5)
    assert seen.count("bad") == 3
    assert seen.count("good") == 1


async def test_a_look_can_ask_for_another() -> None:
    seen = 0

    async def work(key: str) -> float | None:
        nonlocal seen
        seen += 1
        return 0.01 if seen < 3 else None

    queue = WorkQueue(work)
    queue.add("a")
    await _drive(queue)
    assert seen == 3


def test_the_configuration_is_read_from_the_charts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("trainerImage: r/t:1\ngpuClasses:\n  - {name: mine, memoryMiB: 24000, computeCapability: 7.5}\n")
    monkeypatch.setenv(ENV_CONFIG, str(file))
    config = OperatorConfig.load()
    assert config.trainer_image == "r/t:1"
    assert config.gpu_classes[0].memory_mib == 24000


def test_a_typo_in_the_configuration_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("trainerImag: x\n")
    with pytest.raises(ValidationError, match="trainerImag"):
        OperatorConfig.load(file)


def test_an_empty_configuration_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("")
    assert OperatorConfig.load(file) == OperatorConfig()


def test_gpu_class_names_are_unique() -> None:
    assert len({gpu.name for gpu in SHIPPED}) == len(SHIPPED)


def test_events_keep_to_the_api_servers_limit() -> None:
    assert len(Event("Normal", "Long", "x" * 5000).message) == MAX_EVENT_MESSAGE


def test_jobs_are_counted_by_namespace_and_phase() -> None:
    text = Metrics(lambda: [("a", "Training"), ("a", "Training"), ("b", "Failed")]).render().decode()
    assert 'qlora_jobs{namespace="a",phase="Training"} 2.0' in text
    assert 'qlora_jobs{namespace="b",phase="Failed"} 1.0' in text
    assert 'qlora_jobs{namespace="b",phase="Training"} 0.0' in text


def test_measurements_reach_their_histograms() -> None:
    metrics = Metrics(list)
    metrics.record([Measurement("oom_replans", 1), Measurement("oom_replans", 1)])
    assert "qlora_oom_replans_total 2.0" in metrics.render().decode()
    metrics.record([Measurement("queue_seconds", 3.0), Measurement("vram_prediction_ratio", 0.9)])
    text = metrics.render().decode()
    assert "qlora_queue_seconds_count 1.0" in text
    assert 'qlora_vram_prediction_ratio_bucket{le="0.9"} 1.0' in text
