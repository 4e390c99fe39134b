"""Names as cells of CSV files: no spreadsheet computes them, and they come back as they were."""

import csv

import pytest

from mambahome_jax.support.files import csv_name, read_name, write_csv

NAMES = [
    *("case 1", "liver, left", 'a "b"', "a\nb", "", "ä'b"),
    *("=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'", "''", "'=1", "'a", "a;=1"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back_and_are_no_formulas(name, tmp_path):
    write_csv(tmp_path / "a.csv", ("name", "number"), [(csv_name(name), 1.5)])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        _, (cell, number) = csv.reader(file)
    assert read_name(cell) == name and number == "1.5"
    assert not cell.startswith(tuple("=+-@\t\r\uff1d"))
    # Where a spreadsheet divides at semicolons, it does not do so within quotes.
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        _, (first, *_) = csv.reader(file, delimiter=";")
    assert first.startswith(cell)


def test_usual_names_stay_as_they_are(tmp_path):
    write_csv(tmp_path / "a.csv", ["name"], [[csv_name(name)] for name in ("case_01", "left kidney", "vein's", "3-a")])
    assert (tmp_path / "a.csv").read_text() == "name\ncase_01\nleft kidney\nvein's\n3-a\n"
    # Tables that were written before names had apostrophes.
    assert read_name("=1") == "=1" and read_name("'a") == "'a"
