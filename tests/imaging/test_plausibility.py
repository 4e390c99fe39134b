"""Scans that cannot be what they are taken for are named; realistic ones, however cropped or padded, are not."""

import numpy as np
import pytest

from mambahome_jax.datasets.phantom import phantom
from mambahome_jax.imaging.intensity import intensity_sample, sample_percentiles
from mambahome_jax.imaging.plausibility import (
    extent_mm,
    extent_remark,
    guessed_modality,
    intensity_remark,
    scan_remark,
    volume_remark,
)
from mambahome_jax.ranges import ScanRanges, StructureRange

AFFINE = np.diag([3.0, 3, 4, 1])


@pytest.fixture(scope="module")
def ct():
    """HU of an abdomen in float64, and its label map."""
    image, labels = phantom(3)
    return image.array.astype(float), labels.array


def remark(array, modality="ct", ranges=None) -> str:
    found = scan_remark(np.asarray(array), AFFINE, modality, ranges)
    return "" if found is None else str(found)


def liver_box(labels):
    places = np.argwhere(labels == 1)
    return tuple(slice(low, high) for low, high in zip(places.min(axis=0), places.max(axis=0), strict=True))


def outside_of_the_gantry(shape):
    x, y = (np.arange(n) - n / 2 for n in shape[:2])
    return np.broadcast_to(((x[:, None] ** 2 + y**2) > (shape[0] / 2) ** 2)[..., None], shape)


def noise(shape, std, seed=0):
    return np.random.default_rng(seed).normal(0, std, shape)


GOOD_CT = {
    "as it is": lambda hu, labels: hu,
    "int16": lambda hu, labels: hu.astype(np.int16),
    "padded with -2000": lambda hu, labels: np.where(outside_of_the_gantry(hu.shape), -2000, hu),
    "padded with -3024": lambda hu, labels: np.pad(hu, 8, constant_values=-3024),
    "padded twice": lambda hu, labels: np.pad(
        np.where(outside_of_the_gantry(hu.shape), -2000, hu), 3, constant_values=-3024
    ),
    "air removed": lambda hu, labels: np.where(hu > -300, hu, -1024),
    "cropped to an organ": lambda hu, labels: hu[liver_box(labels)],
    "cropped inside an organ": lambda hu, labels: 60 + noise((20, 20, 20), 8),
    "clipped to a window": lambda hu, labels: hu.clip(-160, 240),
    "metal": lambda hu, labels: np.where(noise(hu.shape, 1) > 2.7, 30000, hu),
    "contrast agent": lambda hu, labels: np.where(labels == 4, 450, hu),
    "a bladder full of contrast agent": lambda hu, labels: (
        np.repeat([-100.0, 50, 60, 1000, 1050], 4000).reshape(20, 20, 50) + noise((20, 20, 50), 15)
    ),
    "lungs": lambda hu, labels: (
        np.repeat([-850.0, -800, -700, 40, -100], 4000).reshape(20, 20, 50) + noise((20, 20, 50), 30)
    ),
    "low dose": lambda hu, labels: hu + noise(hu.shape, 60),
    "low dose, sharp": lambda hu, labels: hu + noise(hu.shape, 180),
    "inside a bladder": lambda hu, labels: (
        np.repeat([5.0, 40, 60, 180], 4000).reshape(20, 20, 40) + noise((20, 20, 40), 7)
    ),
    "head": lambda hu, labels: np.where(hu > -300, np.where(hu > 100, 1200, 35), -1000) + noise(hu.shape, 5),
}
BAD_CT = {
    "1024 too high": (lambda hu, labels: (hu + 1024).clip(0), "most of the body near"),
    "1000 too high": (lambda hu, labels: hu + 1000, "most of the body near"),
    "1024 too high, padded": (lambda hu, labels: np.pad(hu, 8, constant_values=-3024) + 1024, "most of the body near"),
    "1024 too high, low dose": (lambda hu, labels: hu + noise(hu.shape, 30) + 1024, "most of the body near"),
    "1024 too low": (lambda hu, labels: hu - 1024, "nearly all below -200"),
    "ten times too dense": (lambda hu, labels: hu * 10, "below -1500"),
    "twice too dense": (lambda hu, labels: (hu + noise(hu.shape, 10)) * 2, "below -1500"),
    "to 0..1": (lambda hu, labels: (hu + 1024) / 4095, "values from 0 to 0.3"),
    "to -1..1": (lambda hu, labels: hu.clip(-1000, 1000) / 1000, "values from -1 to "),
    "window to 0..1": (lambda hu, labels: (hu.clip(-175, 250) + 175) / 425, "values from 0 to 1;"),
    "to 0..255": (lambda hu, labels: ((hu + 1024) / 4095 * 255).astype(np.uint8), "none below 0"),
    "window to 0..255": (lambda hu, labels: (hu.clip(-160, 240) + 160) / 400 * 255, "none below 0"),
    "z-scores": (lambda hu, labels: (hu - hu.mean()) / hu.std(), "expected Hounsfield units"),
    "unsigned half": (lambda hu, labels: hu + 32768, "none below 0"),
    "MR": (lambda hu, labels: np.abs(400.0 * (hu > -300) + 300.0 * labels + noise(hu.shape, 40)), "none below 0"),
    "MR of 8 bits": (
        lambda hu, labels: (60.0 * (hu > -300) + noise(hu.shape, 8) + 5).clip(0, 255).astype(np.uint8),
        "none below 0",
    ),
    "MR with noise below 0": (
        lambda hu, labels: 400.0 * (hu > -300) + 300.0 * labels + 8 + noise(hu.shape, 8),
        "background near 0",
    ),
    "to a byte, from -1000": (lambda hu, labels: np.round((hu + noise(hu.shape, 8) + 1000) / 2000 * 255), "near 0"),
    "MR to 0..1": (lambda hu, labels: 0.3 * (hu > -300) + 0.1 * labels, "expected Hounsfield units"),
    "PET in Bq/ml": (lambda hu, labels: 5e4 * (labels > 0) + 300 * (hu > -300), "none below 0"),
    "PET in SUV": (lambda hu, labels: 5.0 * (labels > 0) + 0.4 * (hu > -300), "values from 0 to 5.4;"),
    "one value": (lambda hu, labels: np.full(hu.shape, -1024), "all voxels are -1024"),
}


@pytest.mark.parametrize("name", GOOD_CT)
def test_nothing_is_said_of_a_ct(ct, name):
    assert remark(GOOD_CT[name](*ct)) == ""


@pytest.mark.parametrize("name", BAD_CT)
def test_a_scan_that_is_no_ct_is_named(ct, name):
    make, words = BAD_CT[name]
    assert words in remark(make(*ct))


@pytest.mark.parametrize("name", ["as it is", "padded with -2000", "air removed", "low dose", "metal"])
@pytest.mark.parametrize("modality", ["mr", "us"])
def test_a_ct_is_no_mr_and_no_ultrasound(ct, name, modality):
    assert "where CT has them" in remark(GOOD_CT[name](*ct), modality)


GOOD_OTHERS = {
    "MR": BAD_CT["MR"][0],
    "MR to 0..1": BAD_CT["MR to 0..1"][0],
    "ultrasound": lambda hu, labels: (128 * (hu > -300) + noise(hu.shape, 30)).clip(0, 255).astype(np.uint8),
    "z-scores": BAD_CT["z-scores"][0],
    "phase": lambda hu, labels: np.random.default_rng(0).uniform(-4096, 4095, hu.shape),
    "phase of a thousandth": lambda hu, labels: np.random.default_rng(0).uniform(-3142, 3142, hu.shape),
}


@pytest.mark.parametrize("name", GOOD_OTHERS)
@pytest.mark.parametrize("modality", ["mr", "us"])
def test_nothing_is_said_of_scans_without_units(ct, name, modality):
    assert remark(GOOD_OTHERS[name](*ct), modality) == ""


def test_the_channel_is_named(ct):
    hu, _ = ct
    assert remark(np.stack([hu, hu], axis=-1)) == ""
    assert remark(np.stack([hu, hu + 1024], axis=-1)).startswith("channel 1: values from")


def ranges_of(scans, modality="ct", structures=()) -> ScanRanges:
    rows = np.array([sample_percentiles(intensity_sample(scan[..., None]))[0] for scan in scans])
    extents = np.array([extent_mm(scan.shape, AFFINE) for scan in scans])
    percentiles, extent = (
        tuple(zip(values.min(axis=0).tolist(), values.max(axis=0).tolist(), strict=True)) for values in (rows, extents)
    )
    return ScanRanges(modality, len(scans), extent, (percentiles,), tuple(structures))


def test_nothing_is_said_of_a_scan_like_those_of_training(ct):
    trained = ranges_of([phantom(seed)[0].array for seed in range(2)])
    for seed in range(2, 4):
        image = phantom(seed)[0]
        assert scan_remark(image.array, image.affine, "ct", trained) is None
    for name in ("padded with -2000", "air removed", "clipped to a window", "metal", "contrast agent", "low dose"):
        assert remark(GOOD_CT[name](*ct), "ct", trained) == "", name


def test_intensities_far_from_training(ct):
    hu, _ = ct
    trained = ranges_of([hu])
    narrow = 60 + noise(hu.shape, 8)
    assert remark(narrow) == "" and "as in training" in remark(narrow, "ct", trained)
    positive = ranges_of([BAD_CT["MR"][0](*ct)], "mr")
    assert "many below 0" in remark(BAD_CT["z-scores"][0](*ct), "mr", positive)
    # Each MR is scaled by itself: one of another scale is as good.
    assert remark(BAD_CT["MR"][0](*ct) / 4000, "mr", positive) == ""
    negative = ranges_of([BAD_CT["z-scores"][0](*ct)], "mr")
    assert remark(BAD_CT["z-scores"][0](*ct), "mr", negative) == ""


def test_sizes_far_from_training():
    trained = ScanRanges("ct", 2, ((300, 400), (250, 300), (200, 500)))
    assert extent_remark((320, 260, 101), trained) is None and extent_remark((799, 126, 999), trained) is None
    far = str(extent_remark((320, 260, 60), trained))
    assert "320 x 260 x 60 mm along R-L x A-P x S-I, far off along S-I" in far
    assert "about 300 to 400 x 250 to 300 x 200 to 500 mm" in far
    assert "far off along R-L, S-I" in str(extent_remark((900, 260, 1800), trained))


def test_extents_are_of_the_body_whatever_the_order_of_the_axes():
    affine = np.array([[0, 0, -2.0, 0], [3, 0, 0, 0], [0, -4, 0, 0], [0, 0, 0, 1]])
    assert extent_mm((10, 20, 30, 2), affine) == (60, 30, 80)


def test_volumes_far_from_training():
    structures = (StructureRange("liver", 5, 5, 1000, 2000), StructureRange("tumour", 5, 3, 1, 90))
    trained = ScanRanges("ct", 5, ((1, 2),) * 3, (), structures)
    assert volume_remark({"liver": 900.0, "tumour": 0.0, "other": 0.0}, trained) is None
    assert volume_remark({}, trained) is None and volume_remark({"liver": 0.0}, None) is None
    assert str(volume_remark({"liver": 0.0, "tumour": 0.0}, trained)).startswith(
        "found liver 0 ml; expected about 1e+03"
    )
    both = str(volume_remark({"liver": 6100.0, "tumour": 300.0}, trained))
    assert "liver 6.1e+03 ml, tumour 300 ml" in both and "1 to 90 ml, as in training" in both


def test_half_of_the_scans_with_air_are_ct():
    lowest = ([], [-990.0, 0.0], [0.0, 0.0, -1000.0])
    assert [guessed_modality([(low, 900.0) for low in lows]) for lows in lowest] == ["mr", "ct", "mr"]
    # Scaled scans may be of any modality.
    scaled = [(0.0, 1.0), (-1.02, 1.0), (0.0, 255.0), (-4.0, 204.0)]
    assert guessed_modality([(-1024.0, 900.0), (0.0, 1900.0), *scaled]) == "ct" and guessed_modality(scaled) == "mr"


def test_a_sample_shows_every_part_of_a_scan():
    # 256 columns of which a stride of 256 over the flat array would meet one alone.
    array = np.broadcast_to(np.arange(256, dtype=np.int16)[:, None, None, None], (256, 256, 400, 1))
    sample = intensity_sample(array)
    assert len(sample) <= 200_000
    np.testing.assert_allclose(sample_percentiles(sample)[0], np.array([0.5, 5, 50, 95, 99.5]) / 100 * 255, atol=8)


def test_a_single_voxel_keeps_a_scan_from_being_of_one_value():
    array = np.zeros((90, 90, 91, 1), np.float32)
    array[1, 1, 1] = 7
    assert intensity_sample(array)[[0, -1], 0].tolist() == [0, 7]
    assert intensity_remark(intensity_sample(array), "mr") is None
