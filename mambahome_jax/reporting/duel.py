"""A duel as one HTML page that needs nothing beside it: differences, curves over time, cost, what each was given.

Here the page's numbers are made; duel.html.jinja says what they look like, with the parts of page.html.jinja.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mambahome_jax.evaluation.results import METRICS, Score, finite_mean, structures_of
from mambahome_jax.evaluation.systems import RESAMPLES, Difference, holm, score_array, verdict
from mambahome_jax.imaging.pictures import COLOURS
from mambahome_jax.reporting.page import (
    CHOICES,
    LEFT,
    NONE,
    RIGHT,
    WIDTH,
    Cell,
    Row,
    SortableTable,
    chart_of,
    interval_cell,
    number_cell,
    p_cell,
    template,
    ticks_of,
)

CURVE_HEIGHT, _TOP, _BOTTOM = 260, 8, 40  # px
# Of a line on white.
_PALE = {COLOURS[n] for n in (3, 7, 8, 12, 14)}
# attribute of Cost -> heading, digits
COSTS = {
    "parameters": ("M params", 2),
    "gib": ("GiB", 2),
    "images_per_second": ("images/s", 2),
    "compile_seconds": ("compile s", 0),
    "training_minutes": ("train min", 1),
    "steps": ("steps", 0),
    "minutes": ("total min", 1),
}


class Cost(NamedTuple):
    """What the networks of a contestant took; nan where it is not known.

    parameters: in millions. gib: of a compiled step. images_per_second: median over steps. compile_seconds: longest of
    its networks. training_minutes: from the first step on. minutes: all in. steps and both minutes: their means.
    """

    parameters: float
    gib: float
    images_per_second: float
    compile_seconds: float
    training_minutes: float
    steps: float
    minutes: float


@dataclass(frozen=True)
class Standing:
    """A contestant after a duel.

    seeds: scores of the cases held out, for each seed. curves: of each network (minutes, step, Dice) of its
    validations. given: its settings. differences: metric -> to the first contestant, empty of that itself; structures:
    the same of the Dice of each structure. unlike: settings that are to be the same for all, but were not.
    """

    name: str
    seeds: tuple[tuple[Score, ...], ...]
    cost: Cost
    curves: tuple[tuple[tuple[float, float, float], ...], ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    structures: Mapping[str, Difference] = field(default_factory=dict)
    unlike: tuple[str, ...] = ()

    def mean(self, metric: str) -> float:
        """Over its cases, of means over structures and seeds."""
        rows = [row for scores in self.seeds for row in scores]
        values = score_array(self.seeds, metric, sorted({row.case for row in rows}), structures_of(rows))
        return float(finite_mean(finite_mean(finite_mean(values, axis=0), axis=1)))


def verdicts(standings: Sequence[Standing]) -> list[str]:
    """One sentence a contestant on its Dice beside that of the first."""
    first, *others = standings
    sentences, corrected = [], corrected_p(standings, "dice")
    for one in others:
        seeds = min(len(one.seeds), len(first.seeds))
        said = verdict(one.name, first.name, one.differences["dice"], seeds, corrected.get(one.name))
        unlike = ", ".join(dict.fromkeys((*first.unlike, *one.unlike)))
        sentences.append(f"{said}; not trained alike: {unlike}" if unlike else said)
    return sentences


def corrected_p(standings: Sequence[Standing], metric: str) -> dict[str, float]:
    """p of each contestant but the first after Holm's correction for their number; empty where there is one."""
    others = standings[1:]
    values = holm([one.differences[metric].p for one in others])
    return {one.name: value for one, value in zip(others, values, strict=True)} if len(others) > 1 else {}


def render_duel(standings: Sequence[Standing], failures: Sequence[tuple[str, str]], lead: str) -> str:
    """Return the page as text. standings: the first contestant first. failures: (what, reason)."""
    first, *others = standings
    drawn = [colour for colour in COLOURS if colour not in _PALE]
    colours = {one.name: "rgb({}, {}, {})".format(*drawn[n % len(drawn)]) for n, one in enumerate(standings)}
    differing = {name for one in others for name in {*first.given, *one.given} if _of(one, name) != _of(first, name)}
    spread = {one.name: [*one.differences["dice"].of_cases.items()] for one in others}
    page = {
        "names": [one.name for one in standings],
        "first": first.name,
        "seeds": min(len(one.seeds) for one in standings),
        "lead": lead,
        "verdicts": verdicts(standings),
        "scores": [_scores(standings, metric) for metric in METRICS] + [_structures(others)] * bool(others),
        "resamples": f"{RESAMPLES:,}",
        "differences": chart_of("Difference in Dice", "Dice", spread) if spread else None,
        "colours": [(one.name, colours[one.name], _end(one)) for one in standings],
        "curves": [
            chart
            for place, unit in ((0, "minutes"), (1, "steps"))
            if (chart := _curves(standings, colours, place, unit)) is not None
        ],
        "cost": _cost(standings),
        "given": _given(standings, differing),
        "common": [(name, value) for name, value in first.given.items() if name not in differing],
        "failures": failures,
        "data": None,
    }
    return f"{template('duel.html.jinja').html(page)}\n"


def _of(one: Standing, name: str) -> str:
    return one.given.get(name, NONE)


def _difference(found: Difference, digits: int) -> list[Cell]:
    interval = interval_cell(found.low, found.high, digits, sign=True)
    return [number_cell(found.difference, digits, sign=True), interval, p_cell(found.p)]


def _scores(standings: Sequence[Standing], metric: str) -> SortableTable:
    label, digits, _ = CHOICES[metric]
    rows, corrected = [], corrected_p(standings, metric)
    for one in standings:
        found = one.differences.get(metric)
        cells = _difference(found, digits + 1) if found else [Cell(NONE, "")] * 3
        cells += [p_cell(corrected.get(one.name, math.nan))] if corrected else []
        scored = {row.case for scores in one.seeds for row in scores if math.isfinite(getattr(row, metric))}
        cases = len(found.of_cases if found else scored)
        rows.append(Row(one.name, [number_cell(one.mean(metric), digits + 1), *cells, Cell(str(cases), str(cases))]))
    headings = ["contestant", label, "difference", "95 %", "p", *(["p, Holm"] if corrected else []), "cases"]
    return SortableTable(f"scores-{metric}", label, headings, rows)


def _structures(others: Sequence[Standing]) -> SortableTable:
    names = structures_of(row for one in others for scores in one.seeds for row in scores)
    rows = [
        Row(f"{one.name}: {name}", _difference(one.structures[name], CHOICES["dice"][1] + 1))
        for one in others
        for name in names
        if name in one.structures
    ]
    return SortableTable("structures", "Dice of each structure", ["structure", "difference", "95 %", "p"], rows)


def _cost(standings: Sequence[Standing]) -> SortableTable:
    rows = [
        Row(one.name, [number_cell(getattr(one.cost, name), digits) for name, (_, digits) in COSTS.items()])
        for one in standings
    ]
    return SortableTable("cost", "What it took", ["contestant", *(heading for heading, _ in COSTS.values())], rows)


def _given(standings: Sequence[Standing], names: Iterable[str]) -> SortableTable:
    rows = [Row(name, [Cell(_of(one, name)) for one in standings]) for name in sorted(names)]
    return SortableTable("given", "What differs", ["setting", *(one.name for one in standings)], rows)


def _end(one: Standing) -> str:
    """Where its curves end, in the mean."""
    ends = [curve[-1][2] for curve in one.curves if curve]
    return f"{finite_mean(np.array(ends)):.3f}" if ends else NONE


def _curves(standings: Sequence[Standing], colours: Mapping[str, str], place: int, unit: str) -> dict[str, Any] | None:
    """Dice of the validations over minutes or steps; None without validations."""
    drawn = [(one.name, curve) for one in standings for curve in one.curves if curve]
    if not drawn:
        return None
    most = max(point[place] for _, curve in drawn for point in curve) or 1.0
    heights = [point[2] for _, curve in drawn for point in curve]
    bottom = math.floor(min(heights) * 10) / 10
    top = max(math.ceil(max(heights) * 10) / 10, bottom + 0.1)

    def at(point: tuple[float, float, float]) -> tuple[float, float]:
        x, y = point[place] / most, (point[2] - bottom) / (top - bottom)
        return round(LEFT + WIDTH * x, 1), round(_TOP + CURVE_HEIGHT * (1 - y), 1)

    lines = []
    for name, curve in drawn:
        places = [at(point) for point in curve]
        points = " ".join(f"{x},{y}" for x, y in places)
        lines.append({"name": name, "colour": colours[name], "points": points, "places": places})
    ends = "; ".join(f"{name} ends at {curve[-1][2]:.3f}" for name, curve in drawn)
    return {
        **{"title": f"Dice over {unit}", "unit": unit, "description": ends, "lines": lines},
        "ticks": [(round(LEFT + WIDTH * tick / most, 1), f"{tick:g}") for tick in ticks_of(0, most)],
        "rows": [(at((0, 0, tick))[1], f"{tick:g}") for tick in ticks_of(bottom, top)],
        **{"left": LEFT, "right": LEFT + WIDTH, "width": LEFT + WIDTH + RIGHT},
        **{"bottom": _TOP + CURVE_HEIGHT, "height": _TOP + CURVE_HEIGHT + _BOTTOM},
    }
