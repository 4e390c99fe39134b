"""Trained model folders of nnU-Net give its own label maps, through the one way that scans go."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands import convert
from mambahome_jax.config import DataProperties, ModelConfig
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import ConvertConfig, InferConfig
from mambahome_jax.imaging.nnunet import NnunetPreparation
from mambahome_jax.imaging.normalisation import ChannelScheme, PerChannel
from mambahome_jax.inference import batch
from mambahome_jax.inference.batch import _home
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.inference.postprocess import postprocess
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, label, to_network_grid
from mambahome_jax.inference.tiled import importance_map, window_starts
from mambahome_jax.weights.weights import FoldMean, read_weights
from tests.conftest import load_golden
from tests.inference.models import Levels
from tests.nnunet_models import expected, miniature, model_folder, scan

UNCHANGED = PerChannel((ChannelScheme("NoNormalization"),))


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "mirrored"])
@pytest.mark.parametrize("case", ["scan_0", "scan_1"])
@pytest.mark.parametrize("name", ["aniso", "regions"])
def test_label_maps_are_those_of_nnunet(models, name, case, mode):
    home = miniature(name)
    volume = scan(home, case)
    if name not in models:
        models[name] = mh.load_model(model_folder(home), precision="fp32")
    result = mh.segment(models[name], volume, tta=mode == "mirrored")
    np.testing.assert_array_equal(result.array, expected(home, case, mode))
    np.testing.assert_array_equal(result.affine, volume.affine)


@pytest.mark.slow
def test_infer_takes_a_model_folder_and_what_it_was_converted_to(tmp_path):
    home = miniature("aniso")
    scan(home, "scan_0")
    data = shutil.copytree(home / "scans", tmp_path / "scans", ignore=shutil.ignore_patterns("scan_1*"))
    flags = {"data_path": data, "precision": "fp32", "num_devices": 2}
    done = mh.infer(model_path=model_folder(home), output_dir=tmp_path / "a", save_probabilities=True, **flags)
    assert done.exit_code == 0 and not done.failures
    np.testing.assert_array_equal(mh.read_labels(tmp_path / "a/scan_0.nii.gz").array, expected(home, "scan_0", "plain"))
    report = json.loads((tmp_path / "a/run.json").read_text())
    assert report["labels"] == {"1": "organ", "2": "tumour"}
    assert report["settings"]["nnunet"]["axes"] == [0, 2, 1] and report["settings"]["orientation"] is None
    assert len(report["cases"][0]["made_from"]["weights"]) == 2
    assert "remarks" not in report["cases"][0]
    with np.load(tmp_path / "a/scan_0.npz") as file:
        assert file["probabilities"].shape == (10, 27, 22, 3)
    convert.run(ConvertConfig(model_folder(home), tmp_path / "ours"))
    mh.infer(model_path=tmp_path / "ours", output_dir=tmp_path / "b", **flags)
    ours, theirs = (mh.read_labels(tmp_path / run / "scan_0.nii.gz").array for run in "ab")
    np.testing.assert_array_equal(ours, theirs)


def regions_of(levels, regions, **fields):
    preparation = NnunetPreparation((2, 1, 0), UNCHANGED, regions=regions, **fields)
    names = tuple((value, f"region {value}") for value in regions) or ((1, "one"), (2, "two"))
    metadata = DataProperties(spacing=(1, 1, 1), labels=names, patch_size=(8, 8, 8), nnunet=preparation)
    return Levels(levels, metadata=metadata)


def steps():
    """0 outside, then 1, 2 and 3 one in another."""
    array = np.zeros((12, 10, 8, 1), np.float32)
    array[2:11, 1:9, 1:7] = 1
    array[3:9, 2:8, 2:6] = 2
    array[4:7, 3:6, 3:5] = 3
    return array


def test_later_regions_lie_over_earlier_ones():
    # 2 a x - a^2 is above 0 where x is above a / 2.
    model = regions_of((1.0, 3.0, 5.0), (1, 7, 300))
    result = mh.segment(model, mh.Volume(steps(), np.eye(4)))
    np.testing.assert_array_equal(result.array, np.array([0, 1, 7, 300])[steps()[..., 0].astype(int)])
    assert result.array.dtype == np.uint16
    probabilities = []
    networks = Ensemble.of(model)
    settings = Segmenter.of(networks, SegmentOptions()).settings
    grid = to_network_grid(mh.Volume(steps(), np.eye(4)), settings, 1)
    label(networks, grid, None, probabilities.append)
    crop = steps()[2:11, 1:9, 1:7].transpose(2, 1, 0, 3)
    logits = 2 * crop * [1, 3, 5] - np.array([1, 9, 25])
    np.testing.assert_allclose(probabilities[0], 1 / (1 + np.exp(-logits)), atol=1e-3)
    assert networks.class_names == {0: "region 1", 1: "region 7", 2: "region 300"}
    assert networks.label_names == {1: "region 1", 7: "region 7", 300: "region 300"}


@pytest.mark.parametrize(
    ("names", "kept"), [(["region 1"], (0, 1, 1, 1)), (["region 1", "region 300"], (0, 1, 1, 300))]
)
def test_a_region_that_is_chosen_has_no_hole_where_another_lies_in_it(names, kept):
    result = mh.segment(regions_of((1.0, 3.0, 5.0), (1, 7, 300)), mh.Volume(steps(), np.eye(4)), labels=names)
    np.testing.assert_array_equal(result.array, np.array(kept)[steps()[..., 0].astype(int)])


def test_infer_says_what_becomes_of_overlapping_regions(tmp_path, monkeypatch):
    model = regions_of((1.0, 3.0, 5.0), (1, 2, 3), region_values=((1, 2, 3), (2, 3), (3,)))
    monkeypatch.setattr(batch, "load_model", lambda path, precision: model)
    mh.write_volume(tmp_path / "in" / "a.nii.gz", mh.Volume(steps()[..., 0], np.eye(4)))
    lines = []
    config = InferConfig(tmp_path / "in", tmp_path / "model", tmp_path / "out", roi_size=(16, 16, 32), previews=False)
    assert batch.Inference(config, lines.append).run().exit_code == 0
    assert any("the value of the last one that holds it" in line for line in lines)
    assert any("--orientation with theirs, such as LAS, turns scans" in line for line in lines)
    assert Segmenter.of(regions_of((0.0, 1.0), ()), SegmentOptions(orientation="RAS")).notes == ()
    rows = (tmp_path / "out" / "volumes.csv").read_text().splitlines()
    assert rows[1:] == [f"a,region {value},{np.sum(steps() >= value) / 1000}" for value in (1, 2, 3)]
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["regions"] == {"1": [1, 2, 3], "2": [2, 3], "3": [3]}


def test_the_largest_part_of_a_region_is_that_of_all_that_lies_in_it():
    """Parts of region 2 that touch no other of it stay in region 1 around them."""
    array = np.zeros((12, 1, 1), np.uint8)
    array[1:9, 0, 0] = 1, 2, 3, 3, 1, 3, 1, 2
    array[10, 0, 0] = 2
    model = regions_of((1.0, 3.0, 5.0), (1, 2, 3), region_values=((1, 2, 3), (2, 3), (3,)))
    segmenter = Segmenter.of(model, SegmentOptions(keep_largest="all"))
    kept = postprocess(mh.Volume(array, np.eye(4)), None, segmenter.largest, segmenter.regions).array[:, 0, 0]
    np.testing.assert_array_equal(kept, [0, 1, 2, 3, 3, 1, 1, 1, 1, 0, 0, 0])
    only = Segmenter.of(model, SegmentOptions(keep_largest=["region 2"], labels=["region 2", "region 3"]))
    kept = postprocess(mh.Volume(array, np.eye(4)), only.only, only.largest, only.regions).array[:, 0, 0]
    np.testing.assert_array_equal(kept, [0, 0, 2, 3, 3, 0, 0, 0, 0, 0, 0, 0])


def test_logits_of_folds_are_averaged_not_probabilities():
    """One sure network outvotes two others by logits, where it loses by probabilities."""
    volume = mh.Volume(np.full((8, 8, 8, 1), 1.0, np.float32), np.eye(4))

    # Logits 2 l - l^2 of the levels l at the intensity 1: -8 and 1, then 1 and -0.44 twice.
    levels = [(4.0, 1.0), (1.0, 2.2), (1.0, 2.2)]
    folds = [regions_of(each, ()) for each in levels]
    assert mh.segment(FoldMean(folds), volume).array.min() == 1
    # Of several models the probabilities are: two folds of one, where the sure network is, have one of three voices.
    assert mh.segment([FoldMean(folds[:2]), *folds[1:]], volume).array.max() == 0
    options = SegmentOptions(roi_size=(8, 8, 8))
    ours = Ensemble.of([Levels(each, metadata=DataProperties(spacing=None, patch_size=(8, 8, 8))) for each in levels])
    grid = to_network_grid(volume, replace(Segmenter.of(ours, options).settings, normalisation=UNCHANGED), 1)
    assert label(ours, grid).array.max() == 0


def test_probabilities_of_several_models_with_regions_are_those_of_each_region():
    """Two unsure models outvote a sure one by the mean of the sigmoids, and not by that of the logits."""
    volume = mh.Volume(np.full((8, 8, 8, 1), 1.0, np.float32), np.eye(4))
    # Logits 2 l - l^2 at the intensity 1: 1 (0.731) and -3 (0.047); by logits -0.33, by probabilities 0.503.
    models = [regions_of((level,), (5,)) for level in (1.0, 1.0, 3.0)]
    assert mh.segment(FoldMean(models), volume).array.max() == 0
    assert mh.segment(models, volume).array.min() == 5


def test_networks_are_told_apart_by_model_and_not_by_fold():
    folds = [regions_of((1.0, 2.0), ()) for _ in range(4)]
    homes = [batch._home(Path(path)) for path in ("a/fold_0/checkpoint_final.pth", "a/fold_1", "b/fold_0", "c/weights")]
    networks = Ensemble.of(folds, None, homes)
    assert networks.voters == (tuple(folds[:2]), (folds[2],), (folds[3],))
    assert networks.only((1, 2)).voters == ((folds[1],), (folds[2],))


def test_an_image_made_in_slabs_is_that_made_at_once():
    home = miniature("aniso")
    volume = scan(home, "scan_0")
    data = read_weights(model_folder(home) / "fold_0").data
    model = regions_of((0.0, 1.0), ())
    model.metadata, model.config = data, ModelConfig(in_chans=2)
    settings = Segmenter.of(model, SegmentOptions()).settings
    whole, slabs = (to_network_grid(volume, settings, 2, whole_bytes=n) for n in (1 << 30, 0))
    assert whole.kept is not None and slabs.kept is None
    for axis in range(3):
        np.testing.assert_allclose(slabs.slab(axis, 3, 6), whole.slab(axis, 3, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", [{"spacing": (1, 1, 1)}, {"modality": "ct"}, {"chain": "trained"}])
def test_the_plans_leave_no_choice_of_the_preparation(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} was given, but nnU-Net's plans"):
        Segmenter.of(regions_of((0.0, 1.0), ()), SegmentOptions(**option))


def test_mirrors_are_those_of_the_checkpoint():
    mirrored = Segmenter.of(regions_of((0.0, 1.0), (), mirror_axes=(0, 2)), SegmentOptions(tta=True))
    assert mirrored.settings.mirrors == ((0, ()), (2, ())) and mirrored.remarks == ()
    without = Segmenter.of(regions_of((0.0, 1.0), ()), SegmentOptions(tta=True))
    assert without.settings.mirrors == () and "allows no axis" in without.remarks[0]


def test_scans_are_turned_where_that_is_asked_for():
    """Axes of the file, unless an orientation is named; the result lies on the file's grid in both."""
    array = np.arange(1, 8 * 6 * 4 + 1, dtype=np.float32).reshape(8, 6, 4, 1)
    volume = mh.Volume(array, np.diag([-1.0, 1, 1, 1]))
    for options, axis in ((SegmentOptions(), array), (SegmentOptions(orientation="RAS"), array[::-1])):
        settings = Segmenter.of(regions_of((0.0, 1.0), ()), options).settings
        grid = to_network_grid(volume, settings, 1)
        np.testing.assert_array_equal(grid.image, axis.transpose(2, 1, 0, 3))
        back = grid.back(grid.image[..., 0].astype(np.uint16))
        np.testing.assert_array_equal(back.array, array[..., 0])


def test_channels_of_several_modalities_are_not_taken_for_one():
    schemes = PerChannel((ChannelScheme("CTNormalization", std=1.0), ChannelScheme("ZScoreNormalization")))
    assert schemes.several and schemes.modality == "mr"
    assert not PerChannel(schemes.channels[:1]).several and PerChannel(schemes.channels[:1]).modality == "ct"


@pytest.mark.parametrize(
    ("size", "patch", "starts"),
    [(8, 8, [0]), (9, 8, [0, 1]), (13, 8, [0, 2, 5]), (27, 8, [0, 4, 8, 11, 15, 19]), (25, 16, [0, 4, 9])],
)
def test_windows_are_spread_evenly(size, patch, starts):
    assert window_starts((size,), (patch,), 0.5, "nnunet").ravel().tolist() == starts


def test_weights_of_windows_are_those_of_nnunet():
    golden = load_golden("baselines/recipe_nnunet.npz")
    if "gaussian/f64_5x7x12" not in golden:
        pytest.skip("only in the full set of goldens, ../shared/parity")
    np.testing.assert_allclose(importance_map((5, 7, 12), "nnunet"), golden["gaussian/f64_5x7x12"], rtol=1e-6)


def test_the_gaussian_has_its_peak_on_a_voxel_and_ends():
    weights = importance_map((8, 8, 12), "nnunet")
    assert weights.max() == weights[4, 4, 6] == 10 and np.count_nonzero(weights == 10) == 1
    assert 0 < weights.min() < 1e-8


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("M/fold_0/checkpoint_final.pth", "M"),
        ("M/fold_all", "M"),
        ("RUN/fold_2/checkpoints/best", "RUN"),
        ("fold_changes/A/checkpoints/best", "fold_changes/A/checkpoints/best"),
        ("fold_1/of/mine/A/checkpoints/best", "fold_1/of/mine/A/checkpoints/best"),
    ],
)
def test_networks_are_folds_of_the_folder_around_them(path, home):
    assert _home(Path(path)) == Path(home)
