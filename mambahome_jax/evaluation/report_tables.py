"""Tables of the HTML report. Everything that came from data goes through `escape`."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mambahome_jax.evaluation.files import without_nan
from mambahome_jax.evaluation.scores import METRICS, Score, finite_mean, score_matrix

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
_VOLUMES = ("volume_ml", "reference_volume_ml", "volume_difference_ml")
NONE = "–"


def sortable(
    name: str,
    headings: Sequence[str],
    rows: Iterable[str],
    caption: str,
    *,
    sorted_by: int | None = None,
    foot: str = "",
) -> str:
    """A table whose headings are buttons. rows: <tr> elements; foot: one that stays at the end.

    sorted_by: column that is in ascending order already.
    """
    heads = "".join(
        f'<th scope="col" aria-sort="{"ascending" if number == sorted_by else "none"}">'
        f'<button type="button">{escape(heading)}</button></th>'
        for number, heading in enumerate(headings)
    )
    title = f'<caption class="status">{escape(caption)}</caption>'
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table id="{escape(name)}">'
        f"{title}<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table></div>"
    )


def cell(value: float, digits: int, share: bool = False, text: str = "") -> str:
    """A <td> that sorts by its value. text: to show after the value."""
    if not math.isfinite(value):
        return f'<td data-value="">{NONE}{escape(text)}</td>'
    bar = f' class="share" style="--v:{value:.4g}"' if share else ""
    return f'<td data-value="{value:.8g}"{bar}>{value:z.{digits}f}{escape(text)}</td>'


def structures_table(statistics: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]) -> str:
    """METRICS of each structure, and of all: mean, interval, median; counts: structure -> {"missed", "invented"}."""
    rows = []
    for name, entry in [*statistics["structures"].items(), ("mean of all", statistics["overall"])]:
        cells = []
        for key in ("missed", "invented"):
            count = counts[name][key] if name in counts else sum(own[key] for own in counts.values())
            cells.append(f'<td data-value="{count}">{count}</td>')
        cells += _spread(entry, METRICS)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    headings = ["structure", "missed", "invented", *_spread_headings(METRICS)]
    return sortable("structures", headings, rows[:-1], "Scores of each structure, means over cases", foot=rows[-1])


def volumes_table(statistics: Mapping[str, Any]) -> str:
    """Volumes of each structure in ml: mean, interval, median."""
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_spread(entry, _VOLUMES))}</tr>'
        for name, entry in statistics["structures"].items()
    ]
    return sortable("volumes", ["structure", *_spread_headings(_VOLUMES)], rows, "Volumes of each structure")


def _spread_headings(metrics: Sequence[str]) -> list[str]:
    return [heading for metric in metrics for heading in (CHOICES[metric][0], "95 %", "median")]


def _spread(entry: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    cells = []
    for metric in metrics:
        found, digits = entry[metric], CHOICES[metric][1]
        cells += [cell(found["mean"], digits), _interval(found, digits), cell(found["median"], digits)]
    return cells


def cases_table(
    scores: Sequence[Score], cases: Sequence[str], structures: Sequence[str], links: Mapping[str, str]
) -> str:
    """One row a case, in the order given (worst Dice first), one column a structure; links: case -> its anchor."""
    values = with_mean(score_matrix(scores, "dice", cases, structures))
    rows = []
    for number, (case, line) in enumerate(zip(cases, values, strict=True)):
        label = f'<a href="#{escape(links[case])}">{escape(case)}</a>' if case in links else escape(case)
        cells = "".join(cell(float(value), 3, share=True) for value in line)
        rows.append(f'<tr data-row="{number}"><th scope="row">{label}</th>{cells}</tr>')
    options = "".join(f'<option value="{metric}">{escape(entry[0])}</option>' for metric, entry in CHOICES.items())
    tools = f'<p class="tools"><label for="metric">Show </label><select id="metric">{options}</select></p>'
    return tools + sortable("cases", ["case", "mean", *structures], rows, "Dice", sorted_by=1)


def cases_json(scores: Sequence[Score], cases: Sequence[str], structures: Sequence[str]) -> str:
    """The same table's values of every metric, as JSON that may stand inside <script>."""
    data = {}
    for metric, (label, digits, share) in CHOICES.items():
        values = with_mean(score_matrix(scores, metric, cases, structures))
        lines = [[float(f"{value:.6g}") for value in line] for line in values]
        data[metric] = {"label": label, "digits": digits, "share": share, "values": lines}
    return inline_json(data)


def inline_json(data: Any) -> str:
    """JSON without <, > and &, so that no text in it can end the <script> around it; nan and inf become null."""
    text = json.dumps(without_nan(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def case_table(rows: Sequence[Score], name: str) -> str:
    """All scores of one case."""
    headings = ["structure", *(label for label, _, _ in CHOICES.values())]
    lines = []
    for row in rows:
        cells = "".join(cell(getattr(row, metric), digits) for metric, (_, digits, _) in CHOICES.items())
        lines.append(f'<tr><th scope="row">{escape(row.structure)}</th>{cells}</tr>')
    return sortable(name, headings, lines, f"Scores of {rows[0].case}")


def comparison_tables(comparison: Mapping[str, Any]) -> str:
    """Differences to another run, as compare_runs gives them (null for nan), for each metric."""
    parts = []
    for metric in METRICS:
        label, digits, _ = CHOICES[metric]
        found = comparison["metrics"][metric]
        lines = []
        for name, entry in [*found["structures"].items(), ("mean of all", found["overall"])]:
            numbers = {key: math.nan if value is None else float(value) for key, value in entry.items()}
            cells = [cell(numbers[key], digits) for key in ("mean", "other_mean", "difference")]
            cells += [_interval(numbers, digits), cell(numbers["p"], 4), f"<td>{int(numbers['cases'])}</td>"]
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
        headings = ["structure", "this run", "other run", "difference", "95 %", "p", "cases"]
        parts.append(
            f"<h3>{escape(label)}</h3>{sortable(f'comparison-{metric}', headings, lines[:-1], label, foot=lines[-1])}"
        )
    return "".join(parts)


def rows_table(rows: Sequence[tuple[str, str]], caption: str) -> str:
    """Two columns of text."""
    lines = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return f'<table class="text"><caption class="status">{escape(caption)}</caption><tbody>{lines}</tbody></table>'


def with_mean(values: np.ndarray) -> np.ndarray:
    """(cases, structures) with the mean over structures as the first column."""
    return np.concatenate([finite_mean(values, axis=1)[:, None], values], axis=1)


def _interval(entry: Mapping[str, Any], digits: int) -> str:
    low, high = float(entry["low"]), float(entry["high"])
    if not (math.isfinite(low) and math.isfinite(high)):
        return f'<td data-value="">{NONE}</td>'
    return f'<td data-value="{low:.8g}">{low:z.{digits}f} to {high:z.{digits}f}</td>'
