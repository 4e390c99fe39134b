"""An evaluation as one HTML page that needs nothing beside it: no network, no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from mambahome_jax.evaluation import report_tables as tables
from mambahome_jax.evaluation.distribution import draw_distribution
from mambahome_jax.evaluation.evaluate import summarise
from mambahome_jax.evaluation.files import Evaluation
from mambahome_jax.evaluation.overlays import Panel
from mambahome_jax.evaluation.report_assets import SCRIPT, STYLE
from mambahome_jax.evaluation.scores import Score, finite_mean, score_matrix, structures_of
from mambahome_jax.evaluation.statistics import describe

# Nothing is loaded from anywhere, whatever the data may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
_CHARTS: tuple[tuple[str, str, str, tuple[float, float] | None], ...] = (
    ("dice", "Dice", "Dice", (0.0, 1.0)),
    ("nsd", "NSD", "NSD", (0.0, 1.0)),
    ("hd95", "HD95", "mm", None),
    ("volume_difference_ml", "Volume, prediction minus reference", "ml", None),
)
_KEY = (
    '<p><span class="key"></span>reference, solid<span class="key prediction"></span>prediction, dashed'
    '<span class="key differs"></span>lighter: the two differ. '
    "The patient's right is on the left.</p>"
)


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
    cases, structures = worst_first(scores), structures_of(scores)
    links = {shown.case: f"case-{number}" for number, shown in enumerate(report.shown, 1)}
    sections = [
        ("summary", "Structures", _summary(scores)),
        ("distribution", "Distribution", _distribution(scores, structures)),
        ("worst", "Worst cases", _worst(report.shown, scores, links)),
        ("all", "All cases", tables.cases_table(scores, cases, structures, links)),
        ("comparison", "Comparison with another run", _comparison(report.comparison)),
        ("failures", "Not scored", tables.rows_table(report.failures, "Not scored") if report.failures else ""),
        ("run", "How it was made", _how(report)),
    ]
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>{content}</section>'
        for name, title, content in sections
    )
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>Evaluation of {len(cases)} cases</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    )
    data = f'<script type="application/json" id="data">{tables.cases_json(scores, cases, structures)}</script>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><a class="skip" href="#main">To the content</a>'
        f"<header><h1>Evaluation</h1>{_lead(report, len(cases), len(structures))}<nav>{nav}</nav></header>"
        f'<main id="main">{body}</main><p id="status" class="status" role="status"></p>{data}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _lead(report: Report, cases: int, structures: int) -> str:
    overall = describe(report.evaluation.scores)["overall"]["dice"]
    low, high = overall["low"], overall["high"]
    spread = f" (95 % interval {low:.3f} to {high:.3f})" if np.isfinite([low, high]).all() else ""
    failed = f" {len(report.failures)} could not be scored." if report.failures else ""
    counted = f"{cases} case{'s' * (cases != 1)}, {structures} structure{'s' * (structures != 1)}."
    mean = f"Mean Dice {overall['mean']:.3f}{spread}." if np.isfinite(overall["mean"]) else "No Dice is defined."
    return f"<p>{counted} {mean}{failed}</p>"


def _summary(scores: Sequence[Score]) -> str:
    counts = {name: entry["cases"] for name, entry in summarise(scores)["structures"].items()}
    statistics = describe(scores)
    note = (
        f"95 %: bootstrap interval of the mean, {statistics['resamples']} draws of whole cases, "
        f"seed {statistics['seed']}. "
        "difference: prediction minus reference. missed: cases with the structure in the reference only; "
        "invented: in the prediction only."
    )
    volumes = f"<h3>Volumes</h3>{tables.volumes_table(statistics)}"
    return f'{tables.structures_table(statistics, counts)}{volumes}<p class="faint">{escape(note)}</p>'


def _distribution(scores: Sequence[Score], structures: Sequence[str]) -> str:
    parts = ['<p class="faint">A point is a case; the box goes from the lower to the upper quartile.</p>']
    for metric, title, unit, limits in _CHARTS:
        values = {name: [(r.case, getattr(r, metric)) for r in scores if r.structure == name] for name in structures}
        parts.append(f"<h3>{escape(title)}</h3>{draw_distribution(title, unit, values, limits)}")
    return "".join(parts)


def _worst(shown: Sequence[Shown], scores: Sequence[Score], links: Mapping[str, str]) -> str:
    parts = [_KEY] if any(entry.panels for entry in shown) else []
    for entry in shown:
        rows = [row for row in scores if row.case == entry.case]
        figures = "".join(
            f'<figure><img src="{panel.uri}" alt="{escape(f"{entry.case}, {panel.description}")}">'
            f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
            for panel in entry.panels
        )
        mean = finite_mean(np.array([row.dice for row in rows]))
        dice = f"mean Dice {mean:.3f}" if np.isfinite(mean) else "no Dice"
        remark = f'<p class="faint">No picture: {escape(entry.remark)}</p>' if entry.remark else ""
        planes = f'<div class="planes">{figures}</div>' if figures else ""
        name = links[entry.case]
        table = tables.case_table(rows, f"{name}-scores") if rows else ""
        parts.append(f'<article id="{name}"><h3>{escape(entry.case)}: {dice}</h3>{planes}{remark}{table}</article>')
    return "".join(parts)


def _comparison(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return ""
    alone = [
        (text, ", ".join(map(str, comparison.get(key, []))))
        for key, text in (("only_here", "only in this run"), ("only_there", "only in the other run"))
        if comparison.get(key)
    ]
    note = f'<p class="faint">{escape(str(comparison.get("definition", "")))}</p>'
    return tables.comparison_tables(comparison) + (tables.rows_table(alone, "Cases of one run") if alone else "") + note


def _how(report: Report) -> str:
    summary = report.evaluation.summary
    definitions = summary.get("definitions")
    entries = definitions.items() if isinstance(definitions, Mapping) else ()
    rows = [(f"definition: {key}", str(text)) for key, text in entries]
    if "tolerance_mm" in summary:
        rows.insert(0, ("NSD tolerance, mm", str(summary["tolerance_mm"])))
    run = [*report.run] or [("run.json", "not given: the predictions' run is not known")]
    return tables.rows_table(run, "Run of the predictions") + "<h3>Scores</h3>" + tables.rows_table(rows, "Scores")
