"""Names as cells of CSV files: no spreadsheet computes them, and they come back as they were."""

import csv
import io

import pytest

from mambahome_jax.support.csvtext import csv_name, read_name

NAMES = [
    *("case 1", "liver, left", 'a "b"', "a\nb", "", "ä'b"),
    *("=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'", "''", "'=1", "'a", "a;=1"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_and_are_no_formulas(name):
    text = f"{csv_name(name)},1.5\n"
    ((cell, number),) = csv.reader(io.StringIO(text, newline=""))
    assert read_name(cell) == name and number == "1.5"
    assert not cell.startswith(tuple("=+-@\t\r\uff1d"))
    # Where a spreadsheet divides at semicolons, it does not do so within quotes.
    ((first, *_),) = csv.reader(io.StringIO(text, newline=""), delimiter=";")
    assert first.startswith(cell)


def test_usual_names_stay_as_they_are():
    assert [csv_name(name) for name in ("case_01", "left kidney", "vein's", "3-a")] == [
        "case_01",
        "left kidney",
        "vein's",
        "3-a",
    ]
    # Tables that were written before names had apostrophes.
    assert read_name("=1") == "=1" and read_name("'a") == "'a"
