"""The page about a duel: whatever names hold, its tables and curves."""

import html
import math
from dataclasses import replace

import pytest

from mambahome_jax.evaluation.results import METRICS
from mambahome_jax.evaluation.systems import compare_systems
from mambahome_jax.reporting.duel import Cost, Standing, render_duel, verdicts
from tests.reporting.test_page import EVIL, Page, row

COST = Cost(24.49, 3.1, 22.5, 66.0, 4.2, 801.0, 6.1)


def standings(name="conv", shift=0.1, curves=(((1.0, 10, 0.3), (2.0, 20, 0.5)),)):
    """Of the first and another, over six cases."""
    seeds = [tuple(row(f"c{n}", 1, 0.35 + 0.1 * n + moved, "box") for n in range(6)) for moved in (0.0, shift)]
    first, other = (Standing(each, (rows,), COST, curves) for each, rows in zip(("scan", name), seeds, strict=True))
    first = replace(first, given={"lr": "0.1", "patch_size": "32 32 32"})
    found = {metric: compare_systems(other.seeds, first.seeds, metric) for metric in METRICS}
    return [
        first,
        replace(
            other, given={"lr": "0.2", "patch_size": "32 32 32"}, differences=found, structures={"box": found["dice"]}
        ),
    ]


def cells(page, table):
    """Texts of a table's body, row by row."""
    begin = page.index(f'<table id="{table}"')
    table = Page(page[begin : page.index("</table>", begin) + len("</table>")])
    return [text for tag, text in table.texts if tag in ("th", "td")]


def test_scores_cost_and_what_differs():
    both = standings()
    page = render_duel(both, [("conv, seed 1", "no room")], "2 networks")
    texts = [text for _, text in Page(page).texts]
    assert verdicts(both)[0].startswith("conv is better than scan: Dice +0.1000") and f"{verdicts(both)[0]}." in texts
    dice = cells(page, "scores-dice")
    assert {"0.6000", "0.7000", "+0.1000", "+0.1000 to +0.1000", "0.0312"} <= {*dice}
    assert {"24.49", "22.50", "801"} <= {*cells(page, "cost")}
    given = cells(page, "given")
    assert given[-3:] == ["lr", "0.1", "0.2"] and "patch_size" not in given and "patch_size" in texts
    assert "no room" in texts and "p, Holm" not in page


def test_p_of_several_contestants_is_corrected_too():
    first, other = standings()
    others = [replace(other, name=name) for name in ("conv", "none", "ffn")]
    page = render_duel([first, *others], [], "")
    assert cells(page, "scores-dice")[-3:] == ["0.0312", "0.0938", "6"] and "p, Holm" in page
    said = "p 0.031 (0.094 after Holm's correction), over 6 cases and 1 seed; with that correction they are not"
    assert f"{said} distinguishable; another seed may change that." in html.unescape(page)
    assert "conv: 0.500</span>" in page


def test_cases_that_a_network_missed_have_no_distance_and_the_fewer_seeds_count():
    first, other = standings()
    missed = (replace(other.seeds[0][0], hd95=math.nan), *other.seeds[0][1:])
    other = replace(other, seeds=(missed,), differences={m: compare_systems([missed], first.seeds, m) for m in METRICS})
    page = render_duel([replace(first, seeds=first.seeds * 2), other], [], "")
    assert [cells(page, f"scores-{metric}")[-1] for metric in ("dice", "hd95")] == ["6", "5"]
    assert "over 6 cases and 1 seed; another seed may change that." in page and "With one seed" in page


def test_curves_of_every_network_over_minutes_and_steps():
    page = Page(render_duel(standings(), [], ""))
    lines = [line["points"] for line in page.all("polyline")]
    assert len(lines) == 4 and lines[0] == lines[1]
    (x0, y0), (x1, y1) = (tuple(map(float, place.split(","))) for place in lines[0].split())
    assert x1 > x0 and y1 < y0
    assert "Curves over time" not in render_duel(standings(curves=((),)), [], "")


def test_nothing_of_a_name_is_markup():
    page = render_duel(standings(EVIL), [(EVIL, EVIL)], EVIL)
    assert len(Page(page).all("script")) == 1 and "<img" not in page and "alert('1')" not in page


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_known_is_a_dash(value):
    both = standings(shift=value)
    both[1] = replace(both[1], cost=Cost(*[value] * 7))
    assert cells(render_duel(both, [], ""), "cost")[-7:] == ["–"] * 7
