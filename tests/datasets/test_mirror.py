"""Which label values trade places in a mirror, by their names."""

import pytest

from mambahome_jax.datasets.layouts import amos, mvseg
from mambahome_jax.datasets.layouts.abdomenatlas import STRUCTURES as ATLAS
from mambahome_jax.datasets.layouts.totalsegmentator_mri import STRUCTURES as TOTAL
from mambahome_jax.datasets.structures import mirror_pairs
from mambahome_jax.errors import ConfigError


def test_left_and_right_are_paired_however_they_are_written():
    amos = {1: "spleen", 2: "right kidney", 3: "left kidney", 11: "right adrenal gland", 12: "left adrenal gland"}
    assert mirror_pairs(amos, "LR") == ((2, 3), (11, 12))
    atlas = {3: "kidney_left", 4: "kidney_right", 5: "liver", 21: "Lung_Left", 22: "lung_right"}
    assert mirror_pairs(atlas, "LR") == ((3, 4), (21, 22))
    assert mirror_pairs(amos, "AP") == mirror_pairs(atlas, "IS") == ()


def test_sides_in_other_spellings():
    assert mirror_pairs({1: "KidneyLeft", 2: "KidneyRight", 3: "Parotid_L", 4: "Parotid_R"}, "LR") == ((1, 2), (3, 4))
    assert mirror_pairs({1: "ctx-lh-insula", 2: "ctx-rh-insula", 7: "Lt Femur", 5: "Rt Femur"}, "LR") == (
        (1, 2),
        (5, 7),
    )
    assert mirror_pairs({1: "Left-Lateral-Ventricle", 4: "Right-Lateral-Ventricle", 5: "CSF"}, "LR") == ((1, 4),)


def test_leaflets_trade_places_from_front_to_back_and_the_hippocampus_does_not():
    leaflets = {1: "posterior leaflet", 2: "anterior leaflet"}
    assert mirror_pairs(leaflets, "AP") == ((1, 2),) and mirror_pairs(leaflets, "LR") == ()
    assert mirror_pairs({1: "Anterior", 2: "Posterior"}, "AP") == ()


def test_a_side_without_its_other_is_refused():
    with pytest.raises(ConfigError, match="--mirror LR: left atrium would become"):
        mirror_pairs({1: "left atrium", 2: "aorta"}, "LR")


def test_mirror_of_the_published_tables():
    assert mirror_pairs(dict(enumerate(ATLAS, start=1)), "LR") == ((3, 4), (10, 11), (17, 18), (21, 22))
    assert mirror_pairs(amos.LABELS, "LR") == ((2, 3), (11, 12))
    assert mirror_pairs(mvseg.LABELS, "AP") == ((1, 2),)
    assert mirror_pairs(mvseg.LABELS, "LR") == mirror_pairs(mvseg.LABELS, "IS") == ()
    total = mirror_pairs(dict(enumerate(TOTAL, start=1)), "LR")
    names = {(TOTAL[a - 1], TOTAL[b - 1]) for a, b in total}
    assert len(total) == 15 and ("gluteus_medius_left", "gluteus_medius_right") in names
    assert mirror_pairs({4: "thigh_l", 9: "thigh_r"}, "LR") == ((4, 9),)
