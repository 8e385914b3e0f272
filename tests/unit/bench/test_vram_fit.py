"""What the fit of the memory model takes of measurements."""

from __future__ import annotations

from typing import Any

from bench.vram.fit import merged, newest
from bench.vram.points import CODE, HELD_OUT, LLAMA2_7B, SMOL, Point, outdated


def _measured(point: Point, driver: int, **more: Any) -> dict[str, Any]:
    return {"point": point.to_json(), "driver": driver, "engine": "fast", **more}


def test_new_measurements_are_added_and_old_ones_stay() -> None:
    old, new = _measured(Point(SMOL, 1, 512), 1), _measured(Point(SMOL, 1, 512), 2)
    assert merged([old], [[new]]) == [old, new]


def test_the_same_file_twice_adds_nothing() -> None:
    new = _measured(Point(SMOL, 1, 512), 2)
    assert merged([], [[new], [new]]) == [new]


def test_a_failed_measurement_is_left_out() -> None:
    assert merged([], [[{"point": Point(SMOL, 1, 512).to_json(), "error": "out of memory"}]]) == []


def test_the_newest_measurement_of_a_point_counts() -> None:
    found = newest([_measured(Point(SMOL, 1, 512), 1), _measured(Point(SMOL, 1, 512), 2)])
    assert [each["driver"] for each in found] == [2]


def test_held_out_points_are_marked_and_stay_so() -> None:
    point = Point(SMOL, 3, 512)
    reviewed = merged([], [[_measured(point, 1)]], held_out=True)
    again = merged(reviewed, [[_measured(point, 2)]])
    assert [(each["driver"], each.get("heldOut")) for each in newest(again)] == [(2, True)]
    assert merged([], [[_measured(HELD_OUT[0], 1)]])[0]["heldOut"]


def test_what_was_measured_with_two_chunks_of_logits_is_outdated_where_there_were_two() -> None:
    large, small = Point(SMOL, 16, 1024).workload(), Point(LLAMA2_7B, 1, 512).workload()
    assert [outdated(work, code) for work in (large, small) for code in (1, CODE)] == [True, False, False, False]
