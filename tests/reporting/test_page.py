import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mambahome_jax.evaluation.results import Evaluation, Score, compare_runs
from mambahome_jax.imaging.pictures import Panel
from mambahome_jax.reporting.page import Report, Shown, chart_of, inline_json, render_report, template, worst_first
from mambahome_jax.support.files import jsonable

EVIL = "</script><script>alert('1')</script>\"<img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "link", "img"}


def row(case, label, dice, name=None):
    return Score(case, label, name or f"s{label}", dice, 2.5, math.inf, 0.5, 1.0, 2.0)


class Page(HTMLParser):
    """Elements and text of a page; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page(scores, **parts):
    return Page(render_report(Report(Evaluation(scores, parts.pop("summary", {})), **parts)))


def evil_page():
    scores = [row(EVIL, 1, 0.5, EVIL), row("b", 1, 0.25, EVIL)]
    return page(
        scores,
        summary={"definitions": {EVIL: EVIL}, "tolerance_mm": EVIL},
        shown=[Shown(EVIL, [Panel(b"png", EVIL, EVIL)], remark=EVIL)],
        run=[(EVIL, EVIL)],
        failures=[(EVIL, EVIL)],
        comparison=jsonable(compare_runs(scores, scores)) | {"only_here": [EVIL], "definition": EVIL},
    )


def test_what_came_from_data_is_only_text():
    found = evil_page()
    assert [attributes.get("type") for attributes in found.all("script")] == ["application/json", None]
    assert len(found.all("img")) == 1
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert ("a", EVIL) in found.texts and ("th", EVIL) in found.texts and ("button", EVIL) in found.texts
    assert found.all("img")[0]["alt"] == f"{EVIL}, {EVIL}"


def test_nothing_is_loaded_from_elsewhere():
    found = evil_page()
    policies = [a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policies[0]
    for tag, attributes in found.elements:
        for name in ("src", "href"):
            assert re.match(r"data:|#", attributes.get(name) or "#"), (tag, attributes)
    script, style = ("".join(text for tag, text in found.texts if tag == name) for name in ("script", "style"))
    assert "http" not in script.replace(EVIL, "") and "url(" not in style and "@import" not in style


def test_headings_are_buttons_and_say_how_they_are_sorted():
    found = page([row("a", 1, 0.5), row("b", 1, 0.25)])
    sortable = [a for a in found.all("th") if a.get("scope") == "col"]
    assert {a["aria-sort"] for a in sortable} == {"none", "ascending"}
    assert len(found.all("button")) == len(sortable)
    assert {a["type"] for a in found.all("button")} == {"button"}
    assert len({a["id"] for _, a in found.elements if "id" in a}) == sum("id" in a for _, a in found.elements)


def test_cases_come_worst_first_and_the_json_has_the_same_order():
    scores = [row("a", 1, 0.9), row("b", 1, 0.3), row("c", 1, math.nan), row("b", 2, 0.1), row("a", 2, math.nan)]
    assert worst_first(scores) == ["b", "a", "c"]
    # A structure in the prediction alone, which the mean Dice leaves out, is a mistake to be looked at.
    invented = dataclasses.replace(row("d", 2, math.nan), nsd=0.0)
    assert worst_first([*scores, row("d", 1, 1.0), invented]) == ["b", "d", "a", "c"]
    found = page(scores)
    content = "".join(text for tag, text in found.texts if tag == "script").split("\n")[0]
    data = json.loads(content)
    assert data["dice"]["values"] == [[pytest.approx(0.2), 0.3, 0.1], [0.9, 0.9, None], [None, None, None]]
    assert data["assd"]["values"][0] == [None, None, None]
    assert data["volume_difference_ml"]["values"][1] == [-1, -1, -1]


def test_inline_json_cannot_end_its_element():
    text = inline_json({EVIL: [math.nan, EVIL]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {EVIL: [None, EVIL]}


def test_sections_without_content_are_left_out():
    found = page([row("a", 1, 0.5)])
    names = [a["id"] for a in found.all("section")]
    assert names == ["summary", "distribution", "all", "run"]
    assert [a["id"] for a in evil_page().all("section")][-3:] == ["comparison", "failures", "run"]


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [-3.0, 4.0], [1e-7, 2e-7], [12345.0, math.inf]])
def test_distribution_is_well_formed(values):
    rows = {EVIL: [(EVIL, value) for value in values], "b": [("c", 1.0)]}
    svg = ElementTree.fromstring(str(template().chart(chart_of(EVIL, "mm", rows))))
    shown = [value for value in values if math.isfinite(value)]
    assert len(svg.findall("circle")) == len(shown) + 1
    places = [float(circle.attrib["cx"]) for circle in svg.findall("circle")]
    assert all(170 <= place <= 730 for place in places)
    assert svg.findtext("title") == EVIL
