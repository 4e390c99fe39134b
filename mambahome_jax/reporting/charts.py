"""Where the points, boxes and ticks of a chart of scores lie; page.html.jinja draws them as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ROW, LEFT, WIDTH, RIGHT, TOP, BOTTOM = 34, 170, 560, 60, 8, 30  # px
_LONGEST_LABEL = 24


@dataclass(frozen=True)
class ChartRow:
    """A structure. y: of its middle. summary: in words. without: cases that have no value. box: left end and width,
    from the lower to the upper quartile. points: (x, y, text) a case. Lengths are px."""

    label: str
    y: float
    summary: str
    without: int
    box: tuple[float, float] = (0.0, 0.0)
    median: float = 0.0
    points: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Chart:
    """One row a structure over a common axis. ticks: (x, text)."""

    title: str
    unit: str
    ticks: Sequence[tuple[float, str]]
    rows: Sequence[ChartRow]
    left: int = LEFT
    right: int = LEFT + WIDTH
    width: int = LEFT + WIDTH + RIGHT
    top: int = TOP

    @property
    def bottom(self) -> int:
        """px: of the axis."""
        return TOP + ROW * len(self.rows)

    @property
    def height(self) -> int:
        return self.bottom + BOTTOM

    @property
    def description(self) -> str:
        return "; ".join(row.summary for row in self.rows)


def chart_of(
    title: str, unit: str, values: Mapping[str, Sequence[tuple[str, float]]], limits: tuple[float, float] | None = None
) -> Chart:
    """Make a chart with a point a case, a box between the quartiles and a bar at the median.

    values: structure -> (case, value) with nan and inf, which are counted but not drawn. limits: of the axis, None for
    those of the values.
    """
    span = limits or _limits([value for rows in values.values() for _, value in rows if math.isfinite(value)])
    ticks = [(_place(tick, span), f"{tick:g}") for tick in _ticks(*span)]
    rows = [_row(number, name, entries, span) for number, (name, entries) in enumerate(values.items())]
    return Chart(title, unit, ticks, rows)


def _row(number: int, name: str, entries: Sequence[tuple[str, float]], limits: tuple[float, float]) -> ChartRow:
    y = TOP + ROW * (number + 0.5)
    shown = [(case, value) for case, value in entries if math.isfinite(value)]
    counted = f"{len(shown)} of {len(entries)} cases"
    label = name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"
    if not shown:
        return ChartRow(label, y, f"{name}: no value, {counted}", len(entries))
    low, first, middle, third, high = map(float, np.percentile([value for _, value in shown], (0, 25, 50, 75, 100)))
    # Spread a little so that equal values can be told apart; the same at every run.
    shift = np.random.default_rng(number).uniform(-0.3, 0.3, len(shown)) * ROW
    points = [
        (_place(value, limits), round(y + up, 1), f"{case}: {value:.4g}")
        for (case, value), up in zip(shown, shift, strict=True)
    ]
    left, median, right = (_place(quartile, limits) for quartile in (first, middle, third))
    summary = f"{name}: median {middle:.3g}, from {low:.3g} to {high:.3g}, {counted}"
    box = (left, max(round(right - left, 1), 1))
    return ChartRow(label, y, summary, len(entries) - len(shown), box, median, points)


def _limits(known: Sequence[float]) -> tuple[float, float]:
    low, high = min([0.0, *known]), max([0.0, *known])
    ticks = _ticks(low, high if high > low else low + 1)
    step = ticks[1] - ticks[0]
    return (ticks[0] if low >= ticks[0] else ticks[0] - step), (ticks[-1] if high <= ticks[-1] else ticks[-1] + step)


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{step * number:.12g}") for number in range(first, last + 1)]


def _place(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return round(LEFT + WIDTH * (min(max(value, low), high) - low) / (high - low), 1)
