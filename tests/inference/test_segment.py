import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError
from mambahome_jax.evaluation.metrics import dice
from mambahome_jax.imaging.geometry import orientation_of, reorient, resample, resample_to
from mambahome_jax.imaging.normalisation import CtWindow, MinMax, ZScore, scale_range
from mambahome_jax.imaging.volume import Volume, read_volume
from mambahome_jax.inference.ensemble import Ensemble
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, SegmentSettings, segment, to_network_grid
from mambahome_jax.inference.sliding_window import sliding_window
from tests.conftest import golden_path, load_golden
from tests.imaging.nifti_headers import crop
from tests.inference.models import Convolution, Levels

LEVELS = (0.0, 0.5, 1.0)
HOUNSFIELD = (-175.0, 37.5, 250.0)


def oriented_affine(orientation, spacing, turn=0.0):
    """An affine of that orientation; `turn` (radians) makes it oblique."""
    axes = np.eye(4)
    for column, letter in enumerate(orientation):
        row = ("RL", "AP", "SI").index(next(pair for pair in ("RL", "AP", "SI") if letter in pair))
        axes[:3, column] = 0
        axes[row, column] = spacing[column] * (1 if letter in "RAS" else -1)
    cosine, sine = np.cos(turn), np.sin(turn)
    rotation = np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    affine = rotation @ axes
    affine[:3, 3] = (-31.5, 12.25, 7.0)
    return affine


def blocks(shape, seed=0):
    """A label map of coarse random blocks."""
    coarse = np.random.default_rng(seed).integers(0, 3, [-(-n // 4) for n in shape]).astype(np.uint8)
    for axis in range(3):
        coarse = coarse.repeat(4, axis)
    return coarse[tuple(slice(0, n) for n in shape)]


@settings(max_examples=8)
@given(
    st.sampled_from(["RAS", "LPS", "PSR", "AIL", "SRP"]),
    st.tuples(*[st.integers(9, 21)] * 3),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([None, 0.5]),
)
def test_intensity_levels_come_back_on_odd_grids(orientation, shape, turn, finer):
    spacing = np.array((0.75, 1.5, 4.0))
    affine = oriented_affine(orientation, spacing, turn)
    labels = blocks(shape)
    volume = Volume(np.asarray(HOUNSFIELD, np.float32)[labels], affine)
    # At half the spacing every voxel's centre is one of the network's voxels too, so its label must come back.
    working = None
    if finer is not None:
        working = tuple(reorient(volume, "RAS").spacing * finer)
    metadata = DataProperties(spacing=working, patch_size=(16, 16, 16))
    result = segment(Levels(LEVELS, metadata=metadata), volume)
    assert result.array.dtype == np.uint8
    np.testing.assert_array_equal(result.affine, affine)
    np.testing.assert_array_equal(result.array, labels)


def test_coarser_working_spacing_keeps_shape_and_most_labels():
    cube = np.zeros((40, 36, 30), bool)
    cube[8:30, 6:28, 5:25] = True
    volume = Volume(np.where(cube, np.float32(250), np.float32(-175)), oriented_affine("LIP", (0.9, 1.1, 2.0)))
    result = segment(Levels((0.0, 1.0)), volume, spacing=(1.7, 2.3, 2.9), roi_size=(16, 16, 16), chain="trained")
    assert result.shape == cube.shape
    assert dice(result.array, cube, 1)[0] > 0.95


def test_whole_axis_window_and_callable_model():
    volume = Volume(np.asarray(HOUNSFIELD, np.float32)[blocks((10, 20, 30))], np.eye(4))
    shapes = []

    def model(windows):
        shapes.append(windows.shape)
        return Levels(LEVELS)(windows)

    result = segment(model, volume, spacing=(0, 0, 0), roi_size=(-1, 0, 16))
    assert set(shapes) == {(4, 16, 32, 16, 1)}
    np.testing.assert_array_equal(result.array, blocks((10, 20, 30)))


def test_several_channels():
    scan = np.random.default_rng(0).normal(100, 20, (8, 9, 10, 2)).astype(np.float32)
    scan[..., 0] = np.where(blocks((8, 9, 10)) > 0, 200, 0)
    model = Levels((0.0, 1.0), in_chans=2)
    result = segment(model, Volume(scan, np.eye(4)), spacing=(0, 0, 0), roi_size=(16, 16, 16), modality="us")
    np.testing.assert_array_equal(result.array, blocks((8, 9, 10)) > 0)


def test_network_is_traced_once_for_all_volumes():
    traced = []

    class Counting(Levels):
        def __call__(self, x):
            traced.append(x.shape)
            return super().__call__(x)

    model = Counting(LEVELS)
    for shape in ((20, 20, 20), (9, 33, 12)):
        segment(model, Volume(np.zeros(shape, np.float32), np.eye(4)), roi_size=(16, 16, 16))
    assert traced == [(4, 16, 16, 16, 1)]


def test_says_once_that_it_compiles_and_where_that_is_kept(capsys, monkeypatch):
    class Spoken(Levels):
        """A name of its own, as other tests may have named Levels."""

    volume = Volume(np.zeros((8, 8, 8), np.float32), np.eye(4))
    monkeypatch.setattr("mambahome_jax.inference.segment.keep_programs", lambda: "/cache")
    for _ in range(2):
        segment(Spoken(LEVELS), volume, roi_size=(16, 16, 16))
    assert capsys.readouterr() == ("", "Spoken: compiling for windows of 16 x 16 x 16, once; kept in /cache\n")
    segment(Levels(LEVELS).__call__, volume, roi_size=(16, 16, 16), progress=True)
    assert "windows" in capsys.readouterr().out


def test_settings_come_from_the_model_then_from_the_caller():
    published = SegmentSettings((0.8, 0.8, 3.0), "RAS", CtWindow(), (192, 192, 48), chain="published")
    assert Segmenter.of(Levels(LEVELS), SegmentOptions()).settings == published
    assert Segmenter.of(Levels(LEVELS), SegmentOptions(chain="trained")).settings.chain == "trained"
    assert Segmenter.of(lambda windows: windows, SegmentOptions()).settings.chain == "trained"
    metadata = DataProperties(None, "LPS", "mr", ((1, "a"),), patch_size=(48, 48, 32))
    model = Levels(LEVELS, metadata=metadata)
    assert Segmenter.of(model, SegmentOptions()).settings == SegmentSettings(None, "LPS", ZScore(), (48, 48, 32))
    assert Ensemble.of(model).label_names == {1: "a"}
    assert Segmenter.of(model, SegmentOptions(modality="us", spacing=(1, 2, 3))).settings == SegmentSettings(
        (1, 2, 3), "LPS", MinMax(), (48, 48, 32)
    )


def golden_chain(name):
    golden = {k.partition("/")[2]: v for k, v in load_golden("pipeline/inference.npz").items() if k.startswith(name)}
    if not golden:
        pytest.skip(f"the chain {name!r} starts from a real scan and is not kept here; it is in ../shared/parity")
    params = json.loads(str(golden["params_json"]))
    file = golden_path(f"pipeline/geometry/{params['input']}_image.nii.gz")
    roi, t = params["roi"], params["ramp"]
    i, j, k = np.ogrid[tuple(slice(0, r) for r in roi)]
    factor = 1 + t[0] * i / roi[0] - t[1] * j / roi[1] + t[2] * k / roi[2]
    return golden, params, read_volume(file), Convolution(golden["weight"], golden["bias"], factor)


def assert_same_segmentation(labels, golden):
    two = np.sort(golden["inverted_logits"], axis=0)[-2:]
    clear = two[1] - two[0] > 1e-3
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(labels[clear], golden["segmentation"][clear])


def test_published_chain_equals_monai():
    golden, params, volume, model = golden_chain("published")
    choices = {"spacing": params["pixdim"], "roi_size": params["roi"], "chain": "published"}
    result = segment(model, volume, **choices)
    np.testing.assert_allclose(result.affine, golden["inverted_affine"], rtol=0, atol=1e-5)
    assert_same_segmentation(result.array, golden)

    prepared = to_network_grid(volume, Segmenter.of(model, SegmentOptions(**choices)).settings)
    np.testing.assert_allclose(prepared.image[..., 0], golden["network_input"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(prepared.affine, golden["network_input_affine"], rtol=0, atol=1e-5)
    logits = sliding_window(model, prepared.image, params["roi"], 0.5, "constant", padding_mode="constant")
    np.testing.assert_allclose(np.moveaxis(logits, -1, 0), golden["logits"], rtol=0, atol=1e-3)
    grid = (prepared.oriented.affine, prepared.oriented.shape)
    inverted = resample_to(Volume(np.asarray(logits), prepared.affine), *grid, "nearest")
    back = reorient(inverted, orientation_of(volume.affine))
    np.testing.assert_allclose(np.moveaxis(back.array, -1, 0), golden["inverted_logits"], rtol=0, atol=1e-3)


def test_chain_with_foreground_crop_equals_monai():
    golden, params, volume, model = golden_chain("cropped")
    oriented = reorient(Volume(volume.array[..., None], volume.affine), "RAS")
    resampled = resample(oriented, params["pixdim"])
    scaled = Volume(scale_range(resampled.array, -175, 250, 0, 1, clip=True), resampled.affine)
    start, end = golden["crop_start"], golden["crop_end"]
    cropped = crop(scaled, start, end)
    np.testing.assert_allclose(cropped.array[..., 0], golden["network_input"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(cropped.affine, golden["network_input_affine"], rtol=0, atol=1e-5)
    logits = sliding_window(model, cropped.array, params["roi"])
    np.testing.assert_allclose(np.moveaxis(logits, -1, 0), golden["logits"], rtol=0, atol=1e-3)
    # Zeros where nothing was kept.
    whole = crop(Volume(np.asarray(logits), cropped.affine), -start, np.array(scaled.shape) - start)
    back = reorient(resample_to(whole, oriented.affine, oriented.shape), orientation_of(volume.affine))
    np.testing.assert_allclose(np.moveaxis(back.array, -1, 0), golden["inverted_logits"], rtol=0, atol=1e-3)
    assert_same_segmentation(back.array.argmax(-1), golden)


def test_nifti_header_of_the_scan_is_met_exactly(tmp_path):
    affine = oriented_affine("PSR", (0.7, 5.0, 0.7), 0.3)
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.int16), affine), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    result = segment(Levels(LEVELS), volume, roi_size=(16, 16, 16))
    np.testing.assert_array_equal(result.affine, volume.affine)
    assert result.shape == (9, 8, 7)


@pytest.mark.parametrize(
    ("array", "options", "error", "message"),
    [
        (np.full((4, 4, 4), np.nan, np.float32), {}, DatasetError, "64 voxels are NaN"),
        (np.zeros((4, 4, 4, 3), np.float32), {}, DatasetError, "3 channels or time points"),
        (np.zeros((4, 0, 4), np.float32), {}, DatasetError, "empty volume"),
        (np.zeros((4, 4, 4), np.float32), {"modality": "pet"}, ConfigError, "modality is 'pet'"),
        (np.zeros((4, 4, 4), np.float32), {"chain": "other"}, ConfigError, "chain is 'other'"),
        (np.zeros((4, 4, 4), np.float32), {"orientation": "RRS"}, ConfigError, "orientation 'RRS'"),
        (np.zeros((4, 4, 4), np.float32), {"spacing": (1, 1)}, ConfigError, "expected three numbers"),
        (np.zeros((4, 4, 4), np.float32), {"overlap": 1}, ConfigError, "overlap is 1"),
        (np.zeros((4, 4, 4), np.float32), {"roi_size": (16, 16)}, ConfigError, "roi_size is"),
        (np.zeros((4, 4, 4), np.complex64), {}, DatasetError, "voxels of type complex64"),
        (np.zeros((4, 4, 4), np.float32), {"sw_batch_size": 0}, ConfigError, "sw_batch_size is 0"),
    ],
)
def test_says_what_is_wrong(array, options, error, message):
    with pytest.raises(error, match=message):
        segment(Levels(LEVELS), Volume(array, np.eye(4)), **({"roi_size": (16, 16, 16)} | options))


def test_a_scan_without_a_usable_place_is_refused():
    array = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(DatasetError, match=r"volume is a ndarray; expected Volume\(array, affine\)"):
        segment(Levels(LEVELS), array, roi_size=(16, 16, 16))
    with pytest.raises(ConfigError, match="model is a str; expected what load_model gives, or a function"):
        segment("run", Volume(array, np.eye(4)))
    with pytest.raises(ConfigError, match="overlapp: there is no such keyword; did you mean overlap"):
        segment(Levels(LEVELS), Volume(array, np.eye(4)), overlapp=0.5)
    for affine in (np.diag([1.0, 1, 0, 1]), np.full((4, 4), np.nan)):
        with pytest.raises(DatasetError, match="singular affine"):
            segment(Levels(LEVELS), Volume(array, affine), roi_size=(16, 16, 16))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="fp32"):
        segment(Levels((0.0, np.inf)), Volume(np.zeros((4, 4, 4), np.float32), np.eye(4)), roi_size=(16, 16, 16))
