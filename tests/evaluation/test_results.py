import math

import pytest

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.evaluation.results import Score, read_evaluation, summarise, write_metrics
from mambahome_jax.support.files import write_json, write_text

SCORES = [
    Score("a", 1, "liver", 0.5, math.nan, math.inf, 1.0, 2.0, 1.0),
    Score("b", 2, "spleen", 0.25, 1.0, 1.0, 1.0, 2.0, 1.0),
]


def test_comes_back_as_written(tmp_path):
    write_metrics(tmp_path / "metrics.csv", [SCORES[1], SCORES[0]])
    write_json(tmp_path / "summary.json", summarise(SCORES))
    read = read_evaluation(tmp_path)
    assert [(row.case, row.label, row.structure) for row in read.scores] == [("b", 2, "spleen"), ("a", 1, "liver")]
    assert math.isnan(read.scores[1].hd95) and math.isinf(read.scores[1].assd)
    assert read.scores[0].volume_difference_ml == 1
    assert read.summary["structures"]["liver"]["dice"] == 0.5
    (tmp_path / "summary.json").unlink()
    assert [row.label for row in read_evaluation(tmp_path).scores] == [1, 2]


def test_names_that_are_formulas_come_back_too(tmp_path):
    names = ["=1+1", "-a", "'b", "c"]
    write_metrics(tmp_path / "metrics.csv", [Score(name, 1, f"@{name}", 1, 1, 1, 1, 1, 1) for name in names])
    read = read_evaluation(tmp_path).scores
    assert [(row.case, row.structure) for row in read] == [(name, f"@{name}") for name in names]
    assert not [line for line in (tmp_path / "metrics.csv").read_text().splitlines() if line.startswith(("=", "-"))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", None, "metrics.csv: no such file; expected an evaluation.*output_dir"),
        ("metrics.csv", "case,structure,dice\na,b,1\n", "no column 'hd95'; expected case, structure, dice"),
        (
            "metrics.csv",
            "case,structure,dice,hd95,assd,nsd,volume_ml,reference_volume_ml\na,b,x,1,1,1,1,1\n",
            "damaged",
        ),
        ("metrics.csv", "case,structure,dice,hd95,assd,nsd,volume_ml,reference_volume_ml\na,b,1\n", "damaged"),
        (
            "metrics.csv",
            "dice,hd95,assd,nsd,volume_ml,reference_volume_ml,case,structure\n1,1,1,1,1,1,a\n",
            "damaged .a row that ends early",
        ),
        ("metrics.csv", "case,structure\n", "no case was scored"),
        ("summary.json", "{", "not valid JSON"),
        ("summary.json", "[]", "a list; expected an object"),
    ],
)
def test_what_is_no_evaluation(tmp_path, name, content, message):
    write_metrics(tmp_path / "metrics.csv", SCORES)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_evaluation(tmp_path)


def test_a_file_is_whole_or_not_there(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match=r"page\.html: cannot be written: .*name another --output"):
        write_text(tmp_path / "page.html", "text", "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
