"""RUN/progress.png: the loss of a training, and the Dice of each structure in its validations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mambahome_jax.imaging.pictures import BACKGROUND, FAINT, TEXT, colours_of
from mambahome_jax.reporting.page import round_step, ticks_of
from mambahome_jax.support.files import atomic_write

NAME = "progress.png"
WIDTH, HEIGHT = 1100, 320  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 260, 40, 36
# Of the loss there are as many points as columns; each is the mean of the steps in it.
_POINTS = 400
_HELD = 4096  # means of as many steps each, of which those points are made; twice as many steps when they are full
_NAMED = 12  # structures in the legend
_GRID, _LOSS, _MEAN = (60, 60, 60), (110, 170, 255), (255, 255, 255)
Point = tuple[float, float]
Colour = tuple[int, int, int]


class Curve(NamedTuple):
    """A line of a chart: its name, colour, and (step, value) of its points."""

    name: str
    colour: Colour
    points: Sequence[Point]


class Drawn:
    """What is drawn of the rows of metrics.csv: those with a validation, and few means of the loss of any number."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self.steps, self.validated, self.loss = 1.0, list[Mapping[str, Any]](), list[Point]()
        self._each, self._next = 1, list[Point]()
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of the next step, or the validation of the last one."""
        self.steps = float(row["step"])
        self.validated += [row] if _known(row, "val_dice") else []
        self._next += _points([row], "loss")
        if len(self._next) == self._each:
            self.loss += _averaged(self._next, 1)
            self._next.clear()
        if len(self.loss) == _HELD:
            self.loss, self._each = _averaged(self.loss, _HELD // 2), 2 * self._each


def write_curves(path: Path, drawn: Drawn, structures: Sequence[str]) -> None:
    """Draw the curves, whole or not at all. Raises OutputError."""
    steps, rows = drawn.steps, drawn.validated
    loss = Curve("loss", _LOSS, _averaged(drawn.loss, _POINTS))
    palette = colours_of(range(1, len(structures) + 1))
    dice = [
        Curve(name, palette[number], _points(rows, f"dice_{name}")) for number, name in enumerate(structures, start=1)
    ]
    dice = [Curve("mean", _MEAN, _points(rows, "val_dice")), *dice]
    charts = [_chart("Training loss, mean of steps", [loss], steps, _range(loss.points))]
    if any(curve.points for curve in dice):
        charts.append(_chart("Dice of the cases validated on", dice, steps, (0.0, 1.0)))
    picture = Image.new("RGB", (WIDTH, HEIGHT * len(charts)), BACKGROUND)
    for number, chart in enumerate(charts):
        picture.paste(chart, (0, number * HEIGHT))
    with atomic_write(path, "output folder", parents=False) as partial:
        picture.save(partial, "PNG")


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[Point]:
    return [(float(row["step"]), float(row[column])) for row in rows if _known(row, column)]


def _known(row: Mapping[str, Any], column: str) -> bool:
    return row.get(column) not in (None, "")


def _averaged(points: Sequence[Point], most: int) -> list[Point]:
    parts = np.array_split(np.array(points, np.float64).reshape(-1, 2), min(len(points), most) or 1)
    means = [part.mean(axis=0) for part in parts if len(part)]
    return [(float(step), float(value)) for step, value in means]


def _range(points: Sequence[Point]) -> tuple[float, float]:
    """Lowest and highest value on round numbers."""
    values = [value for _, value in points] or [0.0, 1.0]
    low, high = min(values), max(values)
    step = round_step(max(high - low, 0.01 * abs(high), 1e-6))
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, max(last, first + 1) * step


def _chart(title: str, curves: Sequence[Curve], steps: float, bounds: tuple[float, float]) -> Image.Image:
    """Curves over the steps under a title, their names with the last values at the right."""
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    low, high = bounds
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def place(step: float, value: float) -> Point:
        x = _LEFT + (right - _LEFT) * step / steps
        return x, bottom - (bottom - _TOP) * (value - low) / (high - low)

    draw.text((_LEFT, 8), title, TEXT, font)
    for value in ticks_of(low, high):
        (_, y), text = place(0, value), f"{value:.4g}"
        draw.line((_LEFT, y, right, y), _GRID)
        draw.text((_LEFT - 8 - small.getlength(text), y - 9), text, FAINT, small)
    for step in ticks_of(0, steps):
        (x, _), text = place(step, low), f"{step:g}"
        draw.text((x - small.getlength(text) / 2, bottom + 6), text, FAINT, small)
    draw.text((right + 12, bottom + 6), "step", FAINT, small)
    for curve in reversed(curves):
        places = [place(*point) for point in curve.points]
        draw.line(places, curve.colour, 2)
        # A few validations are points; many are a line.
        for x, y in places if len(places) <= 30 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), curve.colour)
    for number, curve in enumerate(curves[: _NAMED + 1]):
        y = _TOP + number * 18
        last = f"{curve.points[-1][1]:.3f}" if curve.points else "-"
        draw.rectangle((right + 14, y + 3, right + 26, y + 13), curve.colour)
        draw.text((right + 34, y), f"{last}  {_short(curve.name)}", TEXT, small)
    if len(curves) > _NAMED + 1:
        draw.text((right + 34, _TOP + (_NAMED + 1) * 18), f"and {len(curves) - _NAMED - 1} more", FAINT, small)
    return image


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}..."
