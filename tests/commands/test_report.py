import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mambahome_jax.commands import evaluate
from mambahome_jax.commands.report import run
from mambahome_jax.errors import ConfigError, DatasetError, OutputError
from mambahome_jax.flags import EvaluateConfig, ReportConfig
from mambahome_jax.imaging.volume import Volume, write_volume

EVIL = "<script>alert(1)<"  # as much of an attack as a file name can hold
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path, shift=0, label=1, grid=AFFINE, shape=(16, 14, 12)):
    array = np.zeros(shape, np.uint8)
    array[3 + shift : 9 + shift, 3:9, 3:9] = label
    write_volume(path, Volume(array, grid))


@pytest.fixture
def home(tmp_path):
    """Three cases that get worse, scans of two of them, and their evaluation."""
    for case, shift in (("a", 0), ("b", 1), (EVIL, 2)):
        write(tmp_path / "out/labels" / f"{case}.nii.gz")
        write(tmp_path / "pred" / f"{case}.nii.gz", shift)
        if case != "a":
            scan = np.random.default_rng(0).normal(0, 100, (16, 14, 12)).astype(np.float32)
            write_volume(tmp_path / "out/images" / f"{case}.nii.gz", Volume(scan, AFFINE))
    write(tmp_path / "out/labels/alone.nii.gz")
    (tmp_path / "out/dataset.json").write_text(json.dumps({"labels": {"1": "<b>liver"}}))
    made = {"command": "infer", "configuration": {"data_path": str(tmp_path / "scans")}, "settings": {"modality": "ct"}}
    (tmp_path / "pred/run.json").write_text(json.dumps(made))
    assert evaluate.run(EvaluateConfig(tmp_path / "pred", tmp_path / "out/labels", tmp_path / "eval")) == 1
    return tmp_path


def config(home, **changes):
    paths = {"predictions": home / "pred", "references": home / "out/labels", "images": home / "out/images"}
    return ReportConfig(home / "eval", **(paths | changes))


def test_one_page_with_the_worst_cases_in_pictures(home, capsys):
    assert run(config(home, worst=2)) == 0
    page = (home / "eval/report.html").read_text()
    assert "<script>alert" not in page and "<b>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;: mean Dice 0.667") == 1
    assert page.index("mean Dice 0.667") < page.index("b: mean Dice 0.833")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert [text.split(",")[1] for _, text in pictures] == [" axial", " coronal", " sagittal"] * 2
    for content, _ in pictures:
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))))) > 50  # a scan is below
    assert str(home) not in page
    assert "no prediction in pred" in page and "<td>scans</td>" in page
    assert [path.name for path in (home / "eval").iterdir() if path.name.startswith(".")] == []
    assert "needs no other file" in capsys.readouterr().out


def test_scores_alone_are_enough(home):
    (home / "eval/summary.json").unlink()
    assert run(ReportConfig(home / "eval", home / "new/page.html")) == 0
    page = (home / "new/page.html").read_text()
    assert "<img" not in page and "mean Dice 0.667" in page and "not given" in page


def test_a_case_without_a_picture_is_named_and_the_rest_is_drawn(home, capsys):
    (home / "pred/b.nii.gz").write_bytes(b"no scan")
    assert run(config(home)) == 1
    page = (home / "eval/report.html").read_text()
    assert page.count("<img") == 3
    assert "No picture: a: images: no scan of this name" in page
    assert "No picture: b.nii.gz: " in page
    assert f"No picture of b: {home / 'pred/b.nii.gz'}" in capsys.readouterr().out


@pytest.mark.parametrize("entry", [{"definitions": "x"}, {"predictions": [1]}, {"references": {"a": 1.5}}])
def test_a_summary_with_entries_of_another_kind_still_gives_a_page(home, entry):
    path = home / "eval/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    assert run(config(home)) == 1  # as without: one case has no scan
    assert (home / "eval/report.html").is_file()


def test_a_scan_on_another_grid_is_brought_to_that_of_the_reference(home):
    scan = Volume(np.zeros((20, 20, 20), np.float32), np.eye(4))
    write_volume(home / "out/images/a.nii.gz", scan)
    assert run(config(home)) == 0
    assert (home / "eval/report.html").read_text().count("<img") == 9


def test_references_of_another_table_are_drawn_by_name(home):
    for case in ("a", "b", EVIL):
        write(home / "out/labels" / f"{case}.nii.gz", label=7)
    (home / "out/dataset.json").write_text(json.dumps({"labels": {"7": "liver"}}))
    (home / "pred/run.json").write_text(json.dumps({"labels": {"1": "liver"}}))
    evaluate.run(EvaluateConfig(home / "pred", home / "out/labels", home / "eval"))
    assert run(config(home, images=None)) == 0
    assert (
        "a, axial, slice 4 of 12, right to left, front to back: reference and prediction differ in 0 voxels"
        in (home / "eval/report.html").read_text()
    )


def test_a_comparison_is_shown(home):
    before = EvaluateConfig(home / "pred", home / "out/labels", home / "before")
    evaluate.run(before)
    evaluate.run(EvaluateConfig(home / "pred", home / "out/labels", home / "eval", compare=home / "before"))
    assert run(ReportConfig(home / "eval")) == 0
    page = (home / "eval/report.html").read_text()
    assert "Comparison with another run" in page and str(home) not in page
    (home / "eval/comparison.json").write_text("{}")
    with pytest.raises(DatasetError, match="no comparison of two runs; expected metrics dice"):
        run(ReportConfig(home / "eval"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"references": None}, ConfigError, "--predictions without --references"),
        ({"predictions": None}, ConfigError, "--references without --predictions"),
        ({"predictions": None, "references": None}, ConfigError, "--images without"),
        ({"worst": -1}, ConfigError, "--worst -1; expected 0 or more"),
        ({"window": (3.0, 3.0)}, ConfigError, "--window 3 3; expected"),
        ({"evaluation": "nowhere"}, DatasetError, r"metrics\.csv: no such file; expected an evaluation"),
        ({"predictions": "nowhere"}, DatasetError, "no such folder"),
        ({"images": "nowhere"}, DatasetError, "no such file or folder"),
        ({"output": "eval"}, OutputError, "a folder has its name. Name another --output"),
    ],
)
def test_says_what_is_wrong(home, changes, error, message):
    paths = {key: home / value if isinstance(value, str) else value for key, value in changes.items()}
    settings = config(home, **{key: value for key, value in paths.items() if key != "evaluation"})
    if "evaluation" in paths:
        settings = ReportConfig(paths["evaluation"])
    with pytest.raises(error, match=message):
        run(settings)
    assert not (home / "eval/report.html").exists()


def test_the_number_of_a_channel_is_no_part_of_a_name(tmp_path, capsys):
    scan = np.random.default_rng(0).normal(0, 100, (16, 14, 12)).astype(np.float32)
    for case in ("x_001", "x_002"):
        write(tmp_path / f"labels/{case}.nii.gz")
        write(tmp_path / f"pred/{case}_0000.nii.gz", shift=1)
        write_volume(tmp_path / f"images/{case}_0000.nii.gz", Volume(scan, AFFINE))
    evaluate.run(EvaluateConfig(tmp_path / "pred", tmp_path / "labels", tmp_path / "eval"))
    paths = {"predictions": tmp_path / "pred", "references": tmp_path / "labels", "images": tmp_path / "images"}
    assert run(ReportConfig(tmp_path / "eval", **paths)) == 0
    assert "No picture" not in capsys.readouterr().out
    for case in ("x_001", "x_002"):
        write_volume(tmp_path / f"images/{case}_0001.nii.gz", Volume(scan, AFFINE))
    assert run(ReportConfig(tmp_path / "eval", **paths)) == 0
    assert "No picture" not in capsys.readouterr().out
