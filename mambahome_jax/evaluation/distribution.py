"""The scores of each structure as a picture: points, box and median in inline SVG, without any script."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

ROW, LEFT, WIDTH, RIGHT, TOP, BOTTOM = 34, 170, 560, 60, 8, 30  # px
_BOX, _POINT = 16, 3.0


def draw_distribution(
    title: str, unit: str, values: Mapping[str, Sequence[tuple[str, float]]], limits: tuple[float, float] | None = None
) -> str:
    """An <svg> with one row a structure: a point a case, box from lower to upper quartile, bar at the median.

    values: structure -> (case, value) with nan and inf, which are counted but not drawn. limits: of the axis, None for
    those of the values. Names are escaped.
    """
    known = [value for rows in values.values() for _, value in rows if math.isfinite(value)]
    low, high = limits or _limits(known)
    height = TOP + ROW * len(values) + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img" aria-label="{escape(title)}" class="chart">',
        f"<title>{escape(title)}</title><desc>{escape(_described(values))}</desc>",
        *_axis(low, high, unit, height),
    ]
    for number, (name, rows) in enumerate(values.items()):
        parts += _row(name, rows, TOP + ROW * (number + 0.5), (low, high), number)
    return "".join(parts) + "</svg>"


def _row(name: str, rows: Sequence[tuple[str, float]], y: float, limits: tuple[float, float], number: int) -> list[str]:
    shown = [(case, value) for case, value in rows if math.isfinite(value)]
    without = len(rows) - len(shown)
    label = name if len(name) <= 24 else name[:23] + "…"
    parts = [f'<text x="{LEFT - 10}" y="{y + 4:.1f}" class="name">{escape(label)}</text>']
    if without:
        parts.append(f'<text x="{LEFT + WIDTH + 8}" y="{y + 4:.1f}" class="note">{without} none</text>')
    if not shown:
        return parts
    array = np.array([value for _, value in shown])
    first, middle, third = (_place(float(q), limits) for q in np.percentile(array, (25, 50, 75)))
    box = f'x="{first:.1f}" y="{y - _BOX / 2:.1f}" width="{max(third - first, 1):.1f}" height="{_BOX}"'
    parts.append(f'<rect {box} class="box"/>')
    # Spread a little so that equal values can be told apart; the same at every run.
    shift = np.random.default_rng(number).uniform(-0.3, 0.3, len(shown)) * ROW
    for (case, value), up in zip(shown, shift, strict=True):
        place = f'cx="{_place(value, limits):.1f}" cy="{y + up:.1f}" r="{_POINT}"'
        parts.append(f'<circle {place} class="point"><title>{escape(f"{case}: {value:.4g}")}</title></circle>')
    line = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - _BOX / 2 - 3:.1f}" y2="{y + _BOX / 2 + 3:.1f}"'
    parts.append(f'<line {line} class="median"/>')
    return parts


def _axis(low: float, high: float, unit: str, height: int) -> list[str]:
    bottom = height - BOTTOM
    parts = []
    for tick in _ticks(low, high):
        x = _place(tick, (low, high))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" class="tick">{tick:g}</text>')
    parts.append(f'<text x="{LEFT + WIDTH}" y="{bottom + 27}" class="unit">{escape(unit)}</text>')
    return parts


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
    return LEFT + WIDTH * (min(max(value, low), high) - low) / (high - low)


def _described(values: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """In words, for those who do not see the picture."""
    texts = []
    for name, rows in values.items():
        known = [value for _, value in rows if math.isfinite(value)]
        spread = "no value"
        if known:
            low, middle, high = np.percentile(known, (0, 50, 100))
            spread = f"median {middle:.3g}, from {low:.3g} to {high:.3g}"
        texts.append(f"{name}: {spread}, {len(known)} of {len(rows)} cases")
    return "; ".join(texts)
