"""The values that say how intensities reach the network, and their form on disk."""

import numpy as np
import pytest

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.normalisation import CtScale, CtWindow, MinMax, ZScore, normalisations

SCALE = CtScale((-50.0,), (400.0,), (90.0,), (60.0,))


def test_each_modality_has_its_own_and_an_override_is_for_all():
    assert normalisations() == {"ct": CtWindow(-175, 250), "mr": ZScore(), "us": MinMax()}
    assert normalisations(SCALE)["ct"] == SCALE
    assert set(normalisations(SCALE, override="ct").values()) == {SCALE}
    assert set(normalisations(SCALE, override="us").values()) == {MinMax()}
    with pytest.raises(ConfigError, match="modality is 'pet'"):
        normalisations(override="pet")


def test_checkpoints_of_earlier_versions_say_it_by_modality_and_scale():
    numbers = {"low": [-50], "high": [400], "mean": [90], "std": [60]}
    assert DataProperties.from_json({"modality": "ct", "ct_scale": numbers}).ct_normalisation == SCALE
    assert DataProperties.from_json({"modality": "mr", "ct_scale": None}).ct_normalisation == CtWindow()
    assert DataProperties.from_json({"modality": "us"}).ct_normalisation == CtWindow()


@pytest.mark.parametrize("ct", [CtWindow(), CtWindow(-100.0, 300.0), SCALE])
def test_what_is_written_is_read_again(ct):
    properties = DataProperties(ct_normalisation=ct)
    assert DataProperties.from_json(properties.to_json()) == properties
    assert (properties.to_json()["ct_scale"] is None) == (ct == CtWindow())


def test_a_window_without_width_is_refused():
    with pytest.raises(ConfigError, match="ct_scale"):
        DataProperties.from_json({"ct_scale": {"low": 3, "high": 2}})


def test_statistics_are_required_where_they_count():
    with pytest.raises(ValueError, match="ZScore needs the statistics"):
        ZScore()(np.zeros((1, 1, 1, 1)), None)
