"""An evaluation as one HTML page that needs nothing beside it: no network, no other file.

Here the page's numbers and texts are made; page.html.jinja says how they look, with page.css and page.js.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mambahome_jax.evaluation.results import METRICS, VOLUMES, Evaluation, Score, score_matrix, structures_of
from mambahome_jax.evaluation.statistics import describe, finite_mean, summarise
from mambahome_jax.imaging.pictures import Panel
from mambahome_jax.reporting.charts import Chart, chart_of
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
    """What a page is made of.

    shown: the worst cases, worst first. run: (what, value) lines of how the predictions were made. failures: (case,
    reason) of what was not scored. comparison: content of comparison.json. Nothing in it is trusted; all is escaped.
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
class Table:
    """A table whose headings are buttons that sort it. foot: a row that stays at the end; sorted_by: column that is in
    ascending order already."""

    name: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Row]
    foot: Row | None = None
    sorted_by: int | None = None


def worst_first(scores: Sequence[Score]) -> list[str]:
    """Cases by their mean Dice over structures, the worst first; those without any Dice last.

    A structure that is in the prediction alone has no Dice; here, where errors are looked for, it counts as 0.
    """
    cases, structures = sorted({row.case for row in scores}), structures_of(scores)
    dice = score_matrix(scores, "dice", cases, structures)
    invented = np.isnan(dice) & (score_matrix(scores, "nsd", cases, structures) == 0)
    means = finite_mean(np.where(invented, 0.0, dice), axis=1)
    return [cases[number] for number in np.argsort(means, kind="stable")]


def render_report(report: Report) -> str:
    """The page as text."""
    scores = report.evaluation.scores
    cases, structures, statistics = worst_first(scores), structures_of(scores), describe(scores)
    links = {shown.case: f"case-{number}" for number, shown in enumerate(report.shown, 1)}
    present = {
        "summary": ("Structures", True),
        "distribution": ("Distribution", True),
        "worst": ("Worst cases", report.shown),
        "all": ("All cases", True),
        "comparison": ("Comparison with another run", report.comparison is not None),
        "failures": ("Not scored", report.failures),
        "run": ("How it was made", True),
    }
    page = {
        "title": f"Evaluation of {len(cases)} cases",
        "lead": _lead(statistics, len(cases), len(structures), len(report.failures)),
        "sections": [(name, title) for name, (title, wanted) in present.items() if wanted],
        "structures": _structures(statistics, scores),
        "volumes": _volumes(statistics),
        "resamples": statistics["resamples"],
        "seed": statistics["seed"],
        "charts": _charts(scores, structures),
        "worst": [_worst(shown, scores, links[shown.case]) for shown in report.shown],
        "metrics": [(metric, label) for metric, (label, _, _) in CHOICES.items()],
        "cases": _cases(scores, cases, structures, links),
        "comparison": None if report.comparison is None else _comparison(report.comparison),
        "failures": report.failures,
        "run": report.run or [("run.json", "not given: the predictions' run is not known")],
        "definitions": _definitions(report.evaluation.summary),
        "data": _cases_json(scores, cases, structures),
    }
    return f"{_template().html(page)}\n"


@functools.cache
def _template() -> Any:
    """Macros of page.html.jinja, by name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
        trim_blocks=True,
    )
    return environment.get_template("page.html.jinja").module


def draw_distribution(
    title: str, unit: str, values: Mapping[str, Sequence[tuple[str, float]]], limits: tuple[float, float] | None = None
) -> str:
    """An <svg> of `chart_of`, with the same arguments. Names are escaped."""
    return str(_template().chart(chart_of(title, unit, values, limits)))


def inline_json(data: Any) -> Markup:
    """JSON without <, > and &, so that no text in it can end the <script> around it; nan and inf become null."""
    text = json.dumps(jsonable(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _lead(statistics: Mapping[str, Any], cases: int, structures: int, failures: int) -> str:
    overall = statistics["overall"]["dice"]
    low, high = overall["low"], overall["high"]
    spread = f" (95 % interval {low:.3f} to {high:.3f})" if np.isfinite([low, high]).all() else ""
    failed = f" {failures} could not be scored." if failures else ""
    counted = f"{cases} case{'s' * (cases != 1)}, {structures} structure{'s' * (structures != 1)}."
    mean = f"Mean Dice {overall['mean']:.3f}{spread}." if np.isfinite(overall["mean"]) else "No Dice is defined."
    return f"{counted} {mean}{failed}"


def _structures(statistics: Mapping[str, Any], scores: Sequence[Score]) -> Table:
    """METRICS of each structure, and of all: mean, interval, median, and how often it is in one label map alone."""
    counts = {name: entry["cases"] for name, entry in summarise(scores)["structures"].items()}
    rows = []
    for name, entry in [*statistics["structures"].items(), ("mean of all", statistics["overall"])]:
        own = [counts[name]] if name in counts else list(counts.values())
        totals = [str(sum(count[key] for count in own)) for key in ("missed", "invented")]
        rows.append(Row(name, [*(Cell(total, total) for total in totals), *_spread(entry, METRICS)]))
    headings = ["structure", "missed", "invented", *_spread_headings(METRICS)]
    return Table("structures", "Scores of each structure, means over cases", headings, rows[:-1], foot=rows[-1])


def _volumes(statistics: Mapping[str, Any]) -> Table:
    rows = [Row(name, _spread(entry, VOLUMES)) for name, entry in statistics["structures"].items()]
    return Table("volumes", "Volumes of each structure", ["structure", *_spread_headings(VOLUMES)], rows)


def _spread_headings(metrics: Sequence[str]) -> list[str]:
    return [heading for metric in metrics for heading in (CHOICES[metric][0], "95 %", "median")]


def _spread(entry: Mapping[str, Any], metrics: Sequence[str]) -> list[Cell]:
    cells = []
    for metric in metrics:
        found, digits = entry[metric], CHOICES[metric][1]
        cells += [_number(found["mean"], digits), _interval(found, digits), _number(found["median"], digits)]
    return cells


def _charts(scores: Sequence[Score], structures: Sequence[str]) -> list[Chart]:
    charts = []
    for metric, title, unit, limits in _CHARTS:
        values = {name: [(r.case, getattr(r, metric)) for r in scores if r.structure == name] for name in structures}
        charts.append(chart_of(title, unit, values, limits))
    return charts


def _worst(shown: Shown, scores: Sequence[Score], name: str) -> dict[str, Any]:
    own = [score for score in scores if score.case == shown.case]
    mean = finite_mean(np.array([score.dice for score in own]))
    rows = [
        Row(s.structure, [_number(getattr(s, metric), digits) for metric, (_, digits, _) in CHOICES.items()])
        for s in own
    ]
    headings = ["structure", *(label for label, _, _ in CHOICES.values())]
    return {
        "name": name,
        "case": shown.case,
        "dice": f"mean Dice {mean:.3f}" if np.isfinite(mean) else "no Dice",
        "panels": shown.panels,
        "remark": shown.remark,
        "scores": Table(f"{name}-scores", f"Scores of {shown.case}", headings, rows) if rows else None,
    }


def _cases(scores: Sequence[Score], cases: Sequence[str], structures: Sequence[str], links: Mapping[str, str]) -> Table:
    """One row a case, in the order given (worst Dice first), one column a structure; links: case -> its anchor."""
    values = _with_mean(score_matrix(scores, "dice", cases, structures))
    rows = [
        Row(case, [_number(float(value), 3, share=True) for value in line], links.get(case, ""), number)
        for number, (case, line) in enumerate(zip(cases, values, strict=True))
    ]
    return Table("cases", "Dice", ["case", "mean", *structures], rows, sorted_by=1)


def _cases_json(scores: Sequence[Score], cases: Sequence[str], structures: Sequence[str]) -> Markup:
    """The same table's values of every metric, as JSON that may stand inside <script>."""
    data = {}
    for metric, (label, digits, share) in CHOICES.items():
        values = _with_mean(score_matrix(scores, metric, cases, structures))
        lines = [[float(f"{value:.6g}") for value in line] for line in values]
        data[metric] = {"label": label, "digits": digits, "share": share, "values": lines}
    return inline_json(data)


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Differences to another run, as compare_runs gives them (null for nan), for each metric."""
    tables = []
    for metric in METRICS:
        label, digits, _ = CHOICES[metric]
        found = comparison["metrics"][metric]
        rows = []
        for name, entry in [*found["structures"].items(), ("mean of all", found["overall"])]:
            numbers = {key: math.nan if value is None else float(value) for key, value in entry.items()}
            cells = [_number(numbers[key], digits) for key in ("mean", "other_mean", "difference")]
            cells += [_interval(numbers, digits), _number(numbers["p"], 4), Cell(str(int(numbers["cases"])))]
            rows.append(Row(name, cells))
        headings = ["structure", "this run", "other run", "difference", "95 %", "p", "cases"]
        tables.append(Table(f"comparison-{metric}", label, headings, rows[:-1], foot=rows[-1]))
    alone = [
        (text, ", ".join(map(str, comparison.get(key, []))))
        for key, text in (("only_here", "only in this run"), ("only_there", "only in the other run"))
        if comparison.get(key)
    ]
    return {"tables": tables, "alone": alone, "definition": str(comparison.get("definition", ""))}


def _definitions(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    definitions = summary.get("definitions")
    entries = definitions.items() if isinstance(definitions, Mapping) else ()
    rows = [(f"definition: {key}", str(text)) for key, text in entries]
    if "tolerance_mm" in summary:
        rows.insert(0, ("NSD tolerance, mm", str(summary["tolerance_mm"])))
    return rows


def _number(value: float, digits: int, share: bool = False) -> Cell:
    if not math.isfinite(value):
        return Cell(NONE, "")
    return Cell(f"{value:z.{digits}f}", f"{value:.8g}", f"{value:.4g}" if share else "")


def _interval(entry: Mapping[str, Any], digits: int) -> Cell:
    low, high = float(entry["low"]), float(entry["high"])
    if not (math.isfinite(low) and math.isfinite(high)):
        return Cell(NONE, "")
    return Cell(f"{low:z.{digits}f} to {high:z.{digits}f}", f"{low:.8g}")


def _with_mean(values: np.ndarray) -> np.ndarray:
    """(cases, structures) with the mean over structures as the first column."""
    return np.concatenate([finite_mean(values, axis=1)[:, None], values], axis=1)
