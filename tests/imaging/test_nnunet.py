"""nnU-Net's way of a scan to its network, against its own resampling and by hand."""

import json

import numpy as np
import pytest

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.nnunet import NnunetPreparation, NnunetScan, aligned_positions, separate_axis
from mambahome_jax.imaging.normalisation import ChannelScheme, PerChannel
from mambahome_jax.imaging.volume import Volume, read_volume, write_volume
from tests.conftest import load_golden

RESAMPLING = json.loads(str(load_golden("baselines/recipe_nnunet.npz")["resample/meta_json"]))


def preparation(*schemes, axes=(0, 1, 2), **fields):
    return NnunetPreparation(axes, PerChannel(schemes or (ChannelScheme("NoNormalization"),)), **fields)


def image_of(scan):
    return scan.part(tuple(slice(0, n) for n in scan.shape))


@pytest.mark.parametrize("case", RESAMPLING)
def test_images_are_resampled_as_nnunet_does(case):
    golden, meta = load_golden("baselines/recipe_nnunet.npz"), RESAMPLING[case]
    array = np.moveaxis(golden[f"resample/{case}/x"], 0, -1)
    expected = np.moveaxis(golden[f"resample/{case}/order3"], 0, -1)
    schemes = [ChannelScheme("NoNormalization")] * array.shape[-1]
    scan = NnunetScan.of(Volume(array, np.diag([*meta["current"], 1])), meta["new"], preparation(*schemes))
    assert separate_axis(scan.spacing, scan.target) == meta["separate"][1]
    assert scan.shape == expected.shape[:3]
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(image_of(scan), expected, rtol=0, atol=bound)
    part = tuple(slice(n // 3, n // 3 + 2) for n in scan.shape)
    np.testing.assert_allclose(scan.part(part), expected[part], rtol=0, atol=bound)


def test_a_voxel_between_two_slices_takes_the_upper_one():
    assert aligned_positions((4,), (2,), 0)[0].tolist() == [1, 3]
    assert aligned_positions((4,), (2,), None)[0].tolist() == [0.5, 2.5]
    assert aligned_positions((3,), (5,), 0)[0].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("spacing", "other", "axis"),
    [
        ((3, 1, 1), (1, 1, 1), None),
        ((3.1, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 9, 1), 1),
        ((5, 5, 1), (9, 1, 1), None),
    ],
)
def test_the_axis_of_thick_slices(spacing, other, axis):
    assert separate_axis(spacing, other) == axis


def hollow():
    """A scan in a border of zeros, with a hole, an inlet and channels that end at different places."""
    array = np.zeros((9, 8, 7, 2), np.int16)
    array[2:7, 1:7, 2:6, 0] = np.arange(1, 121).reshape(5, 6, 4)
    array[4, 3, 3, 0] = 0
    array[3:5, 1, 2:4, 0] = 0
    array[2:8, 2:4, 2:6, 1] = 7
    array[4, 3, 3, 1] = array[3:5, 1, 2:4, 1] = 0
    return array


def test_the_scan_is_cropped_and_normalised_in_its_mask():
    array = hollow()
    schemes = (ChannelScheme("ZScoreNormalization", masked=True), ChannelScheme("RescaleTo01Normalization"))
    scan = NnunetScan.of(Volume(array, np.eye(4)), (1, 1, 1), preparation(*schemes))
    assert scan.crop == (slice(2, 8), slice(1, 7), slice(2, 6))
    crop = array[2:8, 1:7, 2:6].astype(np.float64)
    mask = (crop != 0).any(axis=-1)
    mask[2, 2, 1] = True  # the hole, which is inside; the inlet is not
    assert np.array_equal(scan.mask, mask)
    values = crop[mask, 0]
    image = image_of(scan)
    np.testing.assert_allclose(image[mask, 0], (values - values.mean()) / values.std(), rtol=0, atol=1e-6)
    assert not image[~mask, 0].any()
    np.testing.assert_allclose(image[..., 1], crop[..., 1] / 7, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (ChannelScheme("CTNormalization", low=-2, high=3, mean=1, std=2), [-1.5, -0.5, 1]),
        (ChannelScheme("ZScoreNormalization"), [-1.2247449, 0, 1.2247449]),
        (ChannelScheme("RGBTo01Normalization"), [-4 / 255, 0, 4 / 255]),
        (ChannelScheme("NoNormalization"), [-4, 0, 4]),
    ],
)
def test_the_schemes(scheme, expected):
    scan = NnunetScan.of(Volume(np.array([-4, 0, 4]).reshape(3, 1, 1, 1), np.eye(4)), (1, 1, 1), preparation(scheme))
    np.testing.assert_allclose(image_of(scan).ravel(), expected, rtol=0, atol=1e-6)


def test_axes_go_the_way_of_the_file_or_to_ras():
    array, affine = np.arange(1, 25).reshape(2, 3, 4, 1), np.diag([-1.0, 2.0, 3.0, 1.0])
    of_file = NnunetScan.of(Volume(array, affine), (3, 2, 1), preparation(axes=(2, 1, 0)))
    np.testing.assert_array_equal(image_of(of_file), array.transpose(2, 1, 0, 3))
    canonical = NnunetScan.of(Volume(array, affine), (3, 2, 1), preparation(axes=(2, 1, 0), orientation="RAS"))
    np.testing.assert_array_equal(image_of(canonical), array[::-1].transpose(2, 1, 0, 3))
    for scan in (of_file, canonical):
        np.testing.assert_allclose(scan.affine, scan.oriented.affine)


def test_the_grid_of_the_network_spans_the_crop():
    array = np.zeros((8, 6, 6, 1))
    array[2:8] = 1
    scan = NnunetScan.of(Volume(array, np.diag([1.0, 1.0, 1.0, 1.0])), (2, 1, 1), preparation())
    assert scan.shape == (3, 6, 6)
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [2.5, 0, 0, 1])
    np.testing.assert_allclose(scan.positions()[0], [0, 0.25, 0.75, 1.25, 1.75, 2])


def test_the_spacing_is_that_of_the_header(tmp_path):
    """A turned affine has it with noise of rounding, and a ratio of just 3 is none of more than 3."""
    turned = np.eye(4)
    turned[:3, :3] = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0] * [3, 1, 1]
    write_volume(tmp_path / "a.nii", Volume(np.ones((4, 5, 6), np.float32), turned))
    volume = read_volume(tmp_path / "a.nii")
    scan = NnunetScan.of(Volume(volume.array[..., None], volume.affine, volume.header), (1, 1, 1), preparation())
    assert scan.spacing == (3.0, 1.0, 1.0)


def test_a_scan_of_a_wrong_unit_is_refused():
    with pytest.raises(DatasetError, match="times as many"):
        NnunetScan.of(Volume(np.ones((64, 64, 64, 1)), np.diag([50, 50, 50, 1])), (1, 1, 1), preparation())


def test_what_is_written_is_read_again():
    schemes = (ChannelScheme("CTNormalization", False, -10, 10, 1, 2), ChannelScheme("ZScoreNormalization", True))
    whole = preparation(*schemes, axes=(0, 2, 1), orientation="RAS", mirror_axes=(0, 2), regions=(1, 2))
    properties = DataProperties(nnunet=whole)
    content = json.loads(json.dumps(properties.to_json()))
    assert DataProperties.from_json(content) == properties
    for key, value in {"axes": [0, 0, 1], "regions": [0], "mirror_axes": [3], "normalisation": {}}.items():
        with pytest.raises(ConfigError, match="nnunet is"):
            DataProperties.from_json({"nnunet": content["nnunet"] | {key: value}})
