"""What the fit of the memory model takes of measurements."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bench.vram.fit import RESULTS, Use, merged, newest, points, table
from bench.vram.points import CODE, HELD_OUT, LLAMA2_7B, PHI3, QWEN3, SMOL, Point, outdated
from qlora_vram.calibration import shipped


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


@pytest.mark.parametrize("model", [QWEN3, PHI3])
def test_what_was_measured_on_the_plain_path_is_outdated_where_the_fast_one_is_taken(model: str) -> None:
    """And is held against that path's prediction still: it isn't a measurement of the other."""
    work = Point(model, 1, 512).workload()
    assert (work.engine, outdated(work, 2), outdated(work, CODE)) == ("fast", True, False)
    of_it = [each for each in points() if each.point.model == model]
    short = [each for each in of_it if each.workload.engine == "plain" and each.point.length <= 2048]
    assert {each.use for each in short} <= {"outdated"}


@pytest.mark.parametrize("use", ["fitted", "held out", "recipe"])
def test_the_shipped_constants_keep_what_is_promised_of_what_was_measured(use: Use) -> None:
    """Never more than 1 % under, 90 % of the points within 5 %, all within 10 %."""
    errors = [each.error(shipped()) for each in points() if each.use == use]
    assert min(errors) >= -0.01
    assert np.quantile(np.abs(errors), 0.9) <= 0.05
    assert max(errors) <= 0.1


def test_the_results_tell_of_the_shipped_constants() -> None:
    told = json.loads((RESULTS / "fit.json").read_text(encoding="utf-8"))
    assert (told["contextBytes"], told["slackShare"]) == (shipped().context_bytes, shipped().slack_share)
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == table(points(), shipped())
