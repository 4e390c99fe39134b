"""An evaluation as one HTML page that needs nothing beside it: no network, no other file.

Here the page's numbers are made; page.html.jinja says what they look like, with page.css and page.js.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mambahome_jax.evaluation.results import (
    METRICS,
    VOLUMES,
    Evaluation,
    Score,
    describe,
    finite_mean,
    p_value,
    score_matrix,
    structures_of,
    summarise,
)
from mambahome_jax.imaging.pictures import Panel
from mambahome_jax.support.files import jsonable

# attribute of Score -> label, digits, whether it is a share from 0 to 1
CHOICES: dict[str, tuple[str, int, bool]] = {
    "dice": ("Dice", 3, True),
    "hd95": ("HD95, mm", 2, False),
    "assd": ("ASSD, mm", 2, False),
    "nsd": ("NSD", 3, True),
    "volume_difference_ml": ("volume difference, ml", 2, False),
    "volume_ml": ("volume, ml", 2, False),
    "reference_volume_ml": ("reference volume, ml", 2, False),
}
_CHARTS: tuple[tuple[str, str, str, tuple[float, float] | None], ...] = (
    ("dice", "Dice", "Dice", (0.0, 1.0)),
    ("nsd", "NSD", "NSD", (0.0, 1.0)),
    ("hd95", "HD95", "mm", None),
    ("volume_difference_ml", "Volume, prediction minus reference", "ml", None),
)
NONE = "–"


@dataclass(frozen=True)
class Shown:
    """A case in pictures; remark: why there are none."""

    case: str
    panels: Sequence[Panel] = ()
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """What a page is made of. Nothing in it is trusted; all is escaped.

    shown: the worst cases, worst first. run: (what, value) lines of how the predictions were made. failures: (case,
    reason) of what was not scored. comparison: content of comparison.json.
    """

    evaluation: Evaluation
    shown: Sequence[Shown] = ()
    run: Sequence[tuple[str, str]] = ()
    failures: Sequence[tuple[str, str]] = ()
    comparison: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A <td>. value: what it sorts by, None for its text; share: length of a bar behind it, from 0 to 1."""

    text: str
    value: str | None = None
    share: str = ""


@dataclass(frozen=True)
class Row:
    """A <tr> that begins with a heading. link: its target within the page; number: of the case in the page's data."""

    label: str
    cells: Sequence[Cell]
    link: str = ""
    number: int | None = None


@dataclass(frozen=True)
class SortableTable:
    """A table whose headings are buttons that sort it. foot: a row that stays at the end; sorted_by: column that is in
    ascending order already."""

    name: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Row]
    foot: Row | None = None
    sorted_by: int | None = None


def worst_first(scores: Sequence[Score]) -> list[str]:
    """Sort cases by their mean Dice over structures, the worst first; those without any Dice last.

    A structure that is in the prediction alone has no Dice; here, where errors are looked for, it counts as 0.
    """
    cases, structures = sorted({row.case for row in scores}), structures_of(scores)
    dice = score_matrix(scores, "dice", cases, structures)
    invented = np.isnan(dice) & (score_matrix(scores, "nsd", cases, structures) == 0)
    means = finite_mean(np.where(invented, 0.0, dice), axis=1)
    return [cases[number] for number in np.argsort(means, kind="stable")]


def render_report(report: Report) -> str:
    """Return the page as text."""
    scores, summary = report.evaluation.scores, report.evaluation.summary
    cases, structures, statistics = worst_first(scores), structures_of(scores), describe(scores)
    links = {shown.case: f"case-{number}" for number, shown in enumerate(report.shown, 1)}
    matrices = {metric: score_matrix(scores, metric, cases, structures) for metric in CHOICES}
    # The mean over structures is the first column.
    values = {name: np.concatenate([finite_mean(m, axis=1)[:, None], m], axis=1) for name, m in matrices.items()}
    own = {name: [score for score in scores if score.structure == name] for name in structures}
    definitions = summary.get("definitions")
    page = {
        "cases": len(cases),
        "structures": structures,
        "dice": statistics["overall"]["dice"],
        "failures": report.failures,
        "tables": [_structures(statistics, scores), _volumes(statistics)],
        "resamples": statistics["resamples"],
        "seed": statistics["seed"],
        "charts": [
            chart_of(title, unit, {n: [(s.case, getattr(s, metric)) for s in own[n]] for n in structures}, limits)
            for metric, title, unit, limits in _CHARTS
        ],
        "worst": [_worst(shown, scores, links[shown.case]) for shown in report.shown],
        "metrics": [(metric, label) for metric, (label, _, _) in CHOICES.items()],
        "all": _cases(values["dice"], cases, structures, links),
        "comparison": None if report.comparison is None else _comparison(report.comparison),
        "run": report.run,
        "provenance": _provenance(summary),
        "tolerance": summary.get("tolerance_mm"),
        "definitions": definitions if isinstance(definitions, Mapping) else {},
        "data": inline_json({metric: _as_data(metric, array) for metric, array in values.items()}),
    }
    return f"{template().html(page)}\n"


def _provenance(summary: Mapping[str, Any]) -> str:
    provenance = summary.get("provenance")
    text = provenance.get("summary") if isinstance(provenance, Mapping) else None
    return text if isinstance(text, str) else "Nothing says which of the cases the network was trained on"


@functools.cache
def template(name: str = "page.html.jinja") -> Any:
    """Macros of a template of this folder, by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
        trim_blocks=True,
    )
    return environment.get_template(name).module


def inline_json(data: Any) -> Markup:
    """JSON without <, > and &, so that no text in it can end the <script> around it; nan and inf become null."""
    text = json.dumps(jsonable(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _structures(statistics: Mapping[str, Any], scores: Sequence[Score]) -> SortableTable:
    """METRICS of each structure, and of all: mean, interval, median, and how often it is in one label map alone."""
    counts = {name: entry["cases"] for name, entry in summarise(scores)["structures"].items()}
    rows = []
    for name, entry in [*statistics["structures"].items(), ("mean of all", statistics["overall"])]:
        own = [counts[name]] if name in counts else list(counts.values())
        totals = [str(sum(count[key] for count in own)) for key in ("missed", "invented")]
        rows.append(Row(name, [*(Cell(total, total) for total in totals), *_spread(entry, METRICS)]))
    headings = ["structure", "missed", "invented", *_spread_headings(METRICS)]
    return SortableTable("structures", "Scores of each structure, means over cases", headings, rows[:-1], foot=rows[-1])


def _volumes(statistics: Mapping[str, Any]) -> SortableTable:
    rows = [Row(name, _spread(entry, VOLUMES)) for name, entry in statistics["structures"].items()]
    return SortableTable("volumes", "Volumes of each structure", ["structure", *_spread_headings(VOLUMES)], rows)


def _spread_headings(metrics: Sequence[str]) -> list[str]:
    return [heading for metric in metrics for heading in (CHOICES[metric][0], "95 %", "median")]


def _spread(entry: Mapping[str, Any], metrics: Sequence[str]) -> list[Cell]:
    cells = []
    for metric in metrics:
        values, digits = entry[metric], CHOICES[metric][1]
        cells += [
            number_cell(values["mean"], digits),
            interval_cell(float(values["low"]), float(values["high"]), digits),
            number_cell(values["median"], digits),
        ]
    return cells


def _worst(shown: Shown, scores: Sequence[Score], name: str) -> dict[str, Any]:
    own = [score for score in scores if score.case == shown.case]
    rows = [
        Row(s.structure, [number_cell(getattr(s, metric), digits) for metric, (_, digits, _) in CHOICES.items()])
        for s in own
    ]
    headings = ["structure", *(label for label, _, _ in CHOICES.values())]
    table = SortableTable(f"{name}-scores", f"Scores of {shown.case}", headings, rows)
    return {"name": name, "shown": shown, "dice": finite_mean(np.array([s.dice for s in own])), "scores": table}


def _cases(
    values: np.ndarray, cases: Sequence[str], structures: Sequence[str], links: Mapping[str, str]
) -> SortableTable:
    """One row a case, in the order given (worst Dice first), one column a structure; links: case -> its anchor."""
    rows = [
        Row(case, [number_cell(float(value), 3, share=True) for value in line], links.get(case, ""), number)
        for number, (case, line) in enumerate(zip(cases, values, strict=True))
    ]
    return SortableTable("cases", "Dice", ["case", "mean", *structures], rows, sorted_by=1)


def _as_data(metric: str, values: np.ndarray) -> dict[str, Any]:
    """What `_cases` becomes where another metric is chosen."""
    label, digits, share = CHOICES[metric]
    lines = [[float(f"{value:.6g}") for value in line] for line in values]
    return {"label": label, "digits": digits, "share": share, "values": lines}


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Differences to another run, as compare_runs gives them (null for nan), for each metric."""
    tables = []
    for metric in METRICS:
        label, digits, _ = CHOICES[metric]
        entries = comparison["metrics"][metric]
        rows = []
        for name, entry in [*entries["structures"].items(), ("mean of all", entries["overall"])]:
            numbers = {key: math.nan if value is None else float(value) for key, value in entry.items()}
            cells = [number_cell(numbers[key], digits) for key in ("mean", "other_mean", "difference")]
            cells += [
                interval_cell(numbers["low"], numbers["high"], digits),
                p_cell(numbers["p"]),
                Cell(str(int(numbers["cases"]))),
            ]
            rows.append(Row(name, cells))
        headings = ["structure", "this run", "other run", "difference", "95 %", "p", "cases"]
        tables.append(SortableTable(f"comparison-{metric}", label, headings, rows[:-1], foot=rows[-1]))
    alone = [
        (text, ", ".join(map(str, comparison[key])))
        for key, text in (("only_here", "only in this run"), ("only_there", "only in the other run"))
        if comparison.get(key)
    ]
    return {"tables": tables, "alone": alone, "definition": str(comparison.get("definition", ""))}


def number_cell(value: float, digits: int, share: bool = False, sign: bool = False) -> Cell:
    """A number that sorts by its value; share: with a bar behind it; sign: with its plus."""
    if not math.isfinite(value):
        return Cell(NONE, "")
    return Cell(f"{value:{'+' if sign else ''}z.{digits}f}", f"{value:.8g}", f"{value:.4g}" if share else "")


def p_cell(value: float) -> Cell:
    """A p value; the smallest are less than something, not 0."""
    cell = number_cell(value, 4)
    return replace(cell, text=p_value(value)) if cell.value else cell


def interval_cell(low: float, high: float, digits: int, sign: bool = False) -> Cell:
    """ "low to high", which sorts by its lower end."""
    ends = [number_cell(value, digits, sign=sign) for value in (low, high)]
    return Cell(f"{ends[0].text} to {ends[1].text}", ends[0].value) if all(end.value for end in ends) else ends[0]


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
    ticks = [(_place(tick, span), f"{tick:g}") for tick in ticks_of(*span)]
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
    ticks = ticks_of(low, high if high > low else low + 1)
    step = ticks[1] - ticks[0]
    return (ticks[0] if low >= ticks[0] else ticks[0] - step), (ticks[-1] if high <= ticks[-1] else ticks[-1] + step)


def round_step(span: float) -> float:
    """Distance of about five ticks over a span: 1, 2 or 5 times a power of ten."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def ticks_of(low: float, high: float) -> list[float]:
    """Four to ten round numbers from low to high."""
    step = round_step(high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{step * number:.12g}") for number in range(first, last + 1)]


def _place(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return round(LEFT + WIDTH * (min(max(value, low), high) - low) / (high - low), 1)
