"""Numbers as geometry: ticks that enclose what they measure, and lines that stay inside the plot."""

from __future__ import annotations

import json
import math
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from qlora_trainer.charts import SIDE, Series, bars, label, line_chart, ticks

values = st.floats(-1e9, 1e9)


@given(values, values)
@example(0.0, 5e-324)
@example(1e9, 999999999.9999999)
def test_ticks_enclose_the_interval_and_there_are_a_handful(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 9


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_evenly_spaced_and_their_labels_differ(low: float, width: float) -> None:
    found = ticks(low, low + width)
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) <= min(steps) * (1 + 1e-3) + 1e-12
    if width > 1e-3 * low:
        assert len({label(value) for value in found}) == len(found)


@given(st.lists(st.tuples(st.integers(1, 10**6), values), min_size=1, max_size=40))
def test_every_point_lies_inside_the_plot(points: list[tuple[float, float]]) -> None:
    chart = line_chart("Loss", "", [Series("training", points)])
    assert chart is not None
    (line,) = chart.lines
    places = [tuple(map(float, place.split(","))) for place in line.points.split()]
    assert len(places) == len(points)
    assert all(-1 <= coordinate <= SIDE + 1 for place in places for coordinate in place)
    assert len(json.loads(line.values)) == len(points)


def test_a_larger_value_is_higher_up() -> None:
    chart = line_chart("Loss", "", [Series("training", [(1, 3.0), (2, 1.0), (3, 2.0)])])
    assert chart is not None
    tops = [float(place.split(",")[1]) for place in chart.lines[0].points.split()]
    assert tops[0] < tops[2] < tops[1]


def test_values_that_are_no_numbers_are_left_out() -> None:
    chart = line_chart("Loss", "", [Series("training", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)])])
    assert chart is not None
    assert len(chart.lines[0].points.split()) == 2


def test_a_single_point_is_marked_since_a_line_needs_two() -> None:
    chart = line_chart("Loss", "", [Series("training", [(1, 2.0)])])
    assert chart is not None
    assert len(chart.lines[0].dots) == 1


def test_nothing_to_plot_makes_no_chart() -> None:
    assert line_chart("Loss", "", [Series("training", [])]) is None
    assert line_chart("Loss", "", [Series("training", [(1, math.nan)])]) is None


def test_labels_are_short() -> None:
    assert [label(value) for value in (0.0, 0.25, 2e-4, 1.5e-4, 1250.0, 12000.0, 2e6)] == [
        "0", "0.25", "2e-4", "1.5e-4", "1,250", "12,000", "2e6",
    ]  # fmt: skip


@given(st.dictionaries(st.text(), st.floats(0, 1e12), max_size=8))
def test_parts_of_a_whole_add_up_to_it(amounts: dict[str, float]) -> None:
    total = sum(amounts.values())
    assert sum(bar.percent for bar in bars(amounts, of=total)) <= 100 + 1e-6
