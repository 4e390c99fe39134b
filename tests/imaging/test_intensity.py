"""Intensities: equal to MONAI, and the contract between training and inference."""

import numpy as np
import pytest

from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.intensity import IntensityStatistics, statistics
from mambahome_jax.imaging.normalisation import MinMax, ZScore, normalisation_for, scale_range
from tests.conftest import load_golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("pipeline/intensity.npz")


def last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, -1)


def test_intensity_range_as_monai(golden):
    keys = [key for key in golden if key.endswith("/params")]
    assert len(keys) >= 2
    for key in keys:
        *numbers, clip = golden[key].tolist()
        out = last(golden[key.replace("params", "out")])
        scaled = scale_range(last(golden[key.split("/")[0] + "/x"]), *numbers, clip=bool(clip))
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(scaled, out, rtol=0, atol=1e-6 * np.ptp(out), err_msg=key)


def test_normalisation_as_monai(golden):
    keys = [key for key in golden if "/norm_" in key and "nonzero1" in key and "channelwise1" in key]
    assert keys
    for key in keys:
        x = last(golden[key.split("/")[0] + "/x"])
        np.testing.assert_allclose(ZScore()(x, statistics(x)), last(golden[key]), rtol=0, atol=2e-6, err_msg=key)


def test_statistics_leave_zeros_out_and_keep_channels_apart():
    rng = np.random.default_rng(0)
    array = rng.normal((3, -70), (2, 9), (9, 8, 7, 2)).astype(np.float32)
    array[:4, ..., 0] = 0
    stats = statistics(array)
    used = array[4:, ..., 0].astype(np.float64)
    np.testing.assert_allclose(stats.mean, [used.mean(), array[..., 1].mean(dtype=np.float64)], rtol=1e-9)
    np.testing.assert_allclose(stats.std, [used.std(), array[..., 1].std(dtype=np.float64)], rtol=1e-9)
    assert stats.minimum == tuple(array.min(axis=(0, 1, 2)).tolist())
    assert stats.maximum == tuple(array.max(axis=(0, 1, 2)).tolist())


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.0])
def test_constant_volume_has_a_deviation_of_one(value):
    stats = statistics(np.full((5, 5, 5, 1), value, np.float32))
    assert stats.std == (1.0,)
    assert stats.mean == pytest.approx((value,))


@pytest.mark.parametrize("modality", ["ct", "mr", "us"])
def test_a_crop_is_normalised_as_its_volume(modality):
    rng = np.random.default_rng(0)
    volume = rng.normal((40, 500), (200, 80), (9, 8, 7, 2)).astype(np.float32)
    volume[:3] = 0
    stats = statistics(volume)
    normalise = normalisation_for(modality)
    whole, part = normalise(volume, stats), normalise(volume[2:6, 1:5, 3:], stats)
    assert whole.dtype == np.float32 and whole.shape == volume.shape
    np.testing.assert_array_equal(part, whole[2:6, 1:5, 3:])


def test_normalise_by_modality():
    array = np.array([-1000.0, -175.0, 0.0, 37.5, 250.0, 3000.0]).reshape(1, 1, 6, 1)
    stats = IntensityStatistics(mean=(100.0,), std=(50.0,), minimum=(-1000.0,), maximum=(3000.0,))
    ct, mr, us = (normalisation_for(modality)(array, stats).ravel() for modality in ("ct", "mr", "us"))
    np.testing.assert_allclose(ct, [0, 0, 175 / 425, 0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(mr, [-22, -5.5, 0, -1.25, 3, 58], rtol=1e-6)
    np.testing.assert_allclose(us, [0, 825 / 4000, 0.25, 1037.5 / 4000, 1250 / 4000, 1], rtol=1e-6)


def test_flat_ultrasound_gives_zeros():
    array = np.full((3, 3, 3, 1), 7.0, np.float32)
    np.testing.assert_array_equal(MinMax()(array, statistics(array)), 0)


def test_wrong_arguments_are_named():
    array = np.zeros((2, 2, 2, 1), np.float32)
    with pytest.raises(ConfigError, match="modality is 'pet'"):
        normalisation_for("pet")
    with pytest.raises(ConfigError, match="two different values"):
        scale_range(array, 3, 3, 0, 1)
    with pytest.raises(ValueError, match=r"expected \(D, H, W, C\)"):
        statistics(array[..., 0])
