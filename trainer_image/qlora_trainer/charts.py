"""Numbers of a report as geometry: ticks, lines and bars. Pure; the template draws them.

Coordinates run from 0 to 1000 on both axes and are stretched to whatever room the page has, so a chart is as sharp and
its labels are as large on a phone as on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SIDE = 1000
"""Width and height of the plot, in its own units."""
TICKS = 5
"""Ticks that an axis has, about."""
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""What a tick is a multiple of, times a power of ten."""

SMALLEST = 1e-300
"""An interval that an axis shows: smaller ones have no room for floating-point numbers."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    percent: float
    """From the left, or from the top."""
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A point that is marked, in percent from the left and from the top."""

    left: float
    top: float


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    style: str
    """CSS class."""
    points: str
    """For SVG's polyline."""
    dots: tuple[Dot, ...]
    values: str
    """The same points as JSON, for the readout under the pointer."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with axes."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Points to plot. Those that aren't numbers are left out."""

    name: str
    points: Sequence[Point]
    style: str = "main"
    marked: bool = False
    """Mark every point, not only a lonely one."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram, or a part of a stacked bar."""

    label: str
    value: float
    percent: float


def line_chart(title: str, unit: str, series: Iterable[Series], *, from_zero: bool = False) -> Chart | None:
    """A chart of several series over a shared x axis; None when there is nothing to plot."""
    clean = [Series(s.name, [p for p in s.points if _is_number(p)], s.style, s.marked) for s in series]
    clean = [s for s in clean if s.points]
    if not clean:
        return None
    xs = [x for s in clean for x, _ in s.points]
    ys = [y for s in clean for _, y in s.points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_values = ticks(0.0 if from_zero else min(ys), max(ys))
    y_low, y_high = y_values[0], y_values[-1]

    def place(point: Point) -> Point:
        return ((point[0] - x_low) / (x_high - x_low), (y_high - point[1]) / (y_high - y_low))

    return Chart(
        title=title,
        unit=unit,
        lines=tuple(_line(s, [place(point) for point in s.points]) for s in clean),
        x_ticks=tuple(
            Tick(100 * (value - x_low) / (x_high - x_low), label(value))
            for value in ticks(x_low, x_high)
            if x_low <= value <= x_high and float(value).is_integer()
        ),
        y_ticks=tuple(Tick(100 * (y_high - value) / (y_high - y_low), label(value)) for value in y_values),
    )


def bars(amounts: Mapping[str, float], *, of: float | None = None) -> tuple[Bar, ...]:
    """Bars in percent of `of`, or of the largest."""
    whole = of if of is not None else max(amounts.values(), default=0)
    return tuple(Bar(name, value, 100 * value / whole if whole else 0.0) for name, value in amounts.items())


def ticks(low: float, high: float, count: int = TICKS) -> tuple[float, ...]:
    """Round numbers that enclose an interval, at about `count` equal steps."""
    low, high = _widened(low, high)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(multiple * power for multiple in STEPS if raw <= multiple * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return tuple(round(number * step, digits) for number in range(first, last + 1))


def label(value: float) -> str:
    """A number for an axis: short, and without noise from binary fractions."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _line(series: Series, places: Sequence[Point]) -> Line:
    marked = places if series.marked or len(places) == 1 else ()
    return Line(
        name=series.name,
        style=series.style,
        points=" ".join(f"{x * SIDE:.1f},{y * SIDE:.1f}" for x, y in places),
        dots=tuple(Dot(100 * x, 100 * y) for x, y in marked),
        values="[" + ",".join(f"[{x:.10g},{y:.6g}]" for x, y in series.points) + "]",
    )


def _is_number(point: Point) -> bool:
    return all(math.isfinite(value) for value in point)


def _widened(low: float, high: float) -> tuple[float, float]:
    """An interval that isn't empty, nor so small that a fifth of it is zero."""
    if high - low > max(SMALLEST, max(abs(low), abs(high)) * 1e-9):  # else steps are lost in the rounding of its ends
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin
