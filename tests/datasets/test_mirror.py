"""Which label values trade places in a mirror, by their names."""

import pytest

from mambahome_jax.datasets.mirror import mirror_pairs
from mambahome_jax.errors import ConfigError


def test_left_and_right_are_paired_however_they_are_written():
    amos = {1: "spleen", 2: "right kidney", 3: "left kidney", 11: "right adrenal gland", 12: "left adrenal gland"}
    assert mirror_pairs(amos, "LR") == ((2, 3), (11, 12))
    atlas = {3: "kidney_left", 4: "kidney_right", 5: "liver", 21: "Lung_Left", 22: "lung_right"}
    assert mirror_pairs(atlas, "LR") == ((3, 4), (21, 22))
    assert mirror_pairs(amos, "AP") == mirror_pairs(atlas, "IS") == ()


def test_leaflets_trade_places_from_front_to_back_and_the_hippocampus_does_not():
    leaflets = {1: "posterior leaflet", 2: "anterior leaflet"}
    assert mirror_pairs(leaflets, "AP") == ((1, 2),) and mirror_pairs(leaflets, "LR") == ()
    assert mirror_pairs({1: "Anterior", 2: "Posterior"}, "AP") == ()


def test_a_side_without_its_other_is_refused():
    with pytest.raises(ConfigError, match="--mirror LR: left atrium would become"):
        mirror_pairs({1: "left atrium", 2: "aorta"}, "LR")
