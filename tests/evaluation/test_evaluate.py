import csv
import json
import math

import numpy as np
import pytest

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.evaluation.evaluate import evaluate_case, evaluate_folders
from mambahome_jax.evaluation.pairs import Pair
from mambahome_jax.evaluation.results import COLUMNS, METRICS, Score, summarise, write_metrics
from mambahome_jax.flags import EvaluateConfig
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume, write_volume
from mambahome_jax.support.files import write_json

AFFINE = np.diag([0.5, 1.25, 3.0, 1.0])


def cube(shift=0, label=1, shape=(20, 18, 12)):
    array = np.zeros(shape, np.uint8)
    array[4 + shift : 10 + shift, 4:10, 3:8] = label
    return array


def pair(folder, prediction, reference, names=None, affine=AFFINE, **options):
    for name, array, place in (("p", prediction, affine), ("r", reference, AFFINE)):
        write_volume(folder / f"{name}.nii.gz", Volume(array, place))
    return Pair("case", folder / "p.nii.gz", folder / "r.nii.gz", names or {}, **options)


def test_scores_in_millimetres_and_millilitres(tmp_path):
    (score,) = evaluate_case(pair(tmp_path, cube(2), cube(), {1: "liver"}, tolerance_mm=1.0))
    assert (score.case, score.structure) == ("case", "liver")
    assert score.dice == pytest.approx(2 / 3)
    assert score.hd95 == pytest.approx(1.0)
    assert score.nsd == 1
    assert score.volume_ml == pytest.approx(6 * 6 * 5 * 0.5 * 1.25 * 3 / 1000)
    assert score.reference_volume_ml == score.volume_ml
    assert score.volume_difference_ml == 0


def test_named_and_found_structures_are_all_judged(tmp_path):
    reference = cube() + 3 * cube(8)
    scores = evaluate_case(pair(tmp_path, cube(0, 7), reference, {1: "liver", 2: "spleen"}))
    assert [score.structure for score in scores] == ["liver", "spleen", "label_3", "label_7"]
    assert scores[0].dice == 0
    assert math.isnan(scores[1].dice)
    assert math.isnan(scores[3].dice)
    assert math.isinf(scores[3].assd)


def test_voxels_that_nnunet_ignores_are_left_out_of_scores(tmp_path):
    for name, array in (("ours", cube(2)), ("theirs", np.maximum(cube(), 2 * (cube(2) - (cube(2) & cube()))))):
        (tmp_path / name).mkdir()
        write_volume(tmp_path / name / "a.nii.gz", Volume(array, AFFINE))
    labels = {"background": 0, "liver": 1, "ignore": 2}
    write_json(tmp_path / "theirs" / "dataset.json", {"labels": labels})
    config = EvaluateConfig(predictions=tmp_path / "ours", references=tmp_path / "theirs", output_dir=tmp_path / "out")
    told = []
    result = evaluate_folders(config, told.append)
    (score,) = result.scores
    # 4 of the reference's 6 slices are found, and the 2 slices more of the prediction are not labelled.
    assert (score.structure, score.dice) == ("liver", pytest.approx(0.8))
    assert any("ignore" in line for line in told)


def test_small_differences_of_the_affine_are_rounding(tmp_path):
    moved = AFFINE.copy()
    moved[:3, 3] += 0.01
    (score,) = evaluate_case(pair(tmp_path, cube(), cube(), affine=moved))
    assert score.dice == 1


@pytest.mark.parametrize("stored", ["LPS", "ASR"])
def test_a_prediction_is_matched_by_its_place_however_its_voxels_are_stored(tmp_path, stored):
    (expected,) = evaluate_case(pair(tmp_path, cube(2), cube()))
    turned = reorient(Volume(cube(2), AFFINE), stored)
    (score,) = evaluate_case(pair(tmp_path, turned.array, cube(), affine=turned.affine))
    assert score == expected


@pytest.mark.parametrize("change", ["shape", "shift", "flip", "spacing"])
def test_other_grids_are_refused(tmp_path, change):
    affine, prediction = AFFINE.copy(), cube()
    if change == "shape":
        prediction = cube(shape=(20, 18, 13))
    elif change == "shift":
        affine[0, 3] = 0.4
    elif change == "flip":
        affine[0] *= -1
    else:
        affine[0, 0] = 0.51
    with pytest.raises(DatasetError, match=r"p\.nii\.gz: (a grid that lies up to|grid of .* as in the reference)"):
        evaluate_case(pair(tmp_path, prediction, cube(), affine=affine))


def test_an_image_is_no_label_map(tmp_path):
    with pytest.raises(DatasetError, match="label value"):
        evaluate_case(pair(tmp_path, np.full((4, 4, 4), 0.5, np.float32), np.ones((4, 4, 4), np.uint8)))


def row(case, label, dice, hd95, assd=1.0, nsd=1.0, volume=1.0, reference=1.0):
    return Score(case, label, f"s{label}", dice, hd95, assd, nsd, volume, reference)


def test_mean_over_structures_of_means_over_cases():
    scores = [
        row("a", 1, 1.0, 2.0),
        row("b", 1, 0.5, 4.0),
        row("a", 2, 0.2, math.nan, math.inf, volume=0.0),
        row("b", 2, math.nan, math.nan, math.nan, math.nan, volume=0.0, reference=0.0),
        row("b", 3, math.nan, math.nan, math.inf, 0.0, reference=0.0),
    ]
    summary = summarise(scores)
    structures = summary["structures"]
    assert list(structures) == ["s1", "s2", "s3"]
    assert structures["s1"]["dice"] == pytest.approx(0.75)
    assert structures["s2"]["dice"] == pytest.approx(0.2)
    assert summary["mean"]["dice"] == pytest.approx((0.75 + 0.2) / 2)
    assert summary["mean"]["hd95"] == pytest.approx(3.0)
    assert summary["mean"]["assd"] == pytest.approx(1.0)
    assert structures["s2"]["cases"] == {"both": 0, "missed": 1, "invented": 0, "absent": 1}
    assert structures["s3"]["cases"] == {"both": 0, "missed": 0, "invented": 1, "absent": 1}
    assert math.isnan(summarise([])["mean"]["dice"])


def test_files(tmp_path):
    scores = [row("a", 1, 0.5, math.nan, math.inf)]
    write_metrics(tmp_path / "out" / "metrics.csv", scores)
    with (tmp_path / "out" / "metrics.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert tuple(read) == COLUMNS
    assert read == {
        "case": "a",
        "structure": "s1",
        "dice": "0.5",
        "hd95": "nan",
        "assd": "inf",
        "nsd": "1",
        "volume_ml": "1",
        "reference_volume_ml": "1",
        "volume_difference_ml": "0",
    }
    write_json(tmp_path / "out" / "summary.json", summarise(scores), parents=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["mean"]) == set(METRICS)
    assert summary["mean"]["dice"] == 0.5
    assert summary["structures"]["s1"]["hd95"] is None
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["metrics.csv", "summary.json"]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_metrics(tmp_path / "file" / "metrics.csv", [])
