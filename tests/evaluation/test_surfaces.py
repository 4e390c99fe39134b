"""Which of our definitions equals which package's, on anisotropic phantoms: goldens/surfaces.npz."""

import numpy as np
import pytest

from mambahome_jax.errors import ConfigError
from mambahome_jax.evaluation.metrics import areas_of, assd, codes_of, dice, hausdorff, hd95, nsd
from tests.conftest import load_golden

PAIRS = ("shifted", "outlier", "equal", "empty_prediction", "empty_reference", "both_empty", "noise", "border")
AREA = {"surface": "area"}
# Ours -> what it equals, and how near: MONAI computes in float32, surface-distance in float64.
EQUAL = {
    "monai/dice": (1e-6, lambda p, r, s: dice(p, r, 3, s)),
    "monai/hd95": (1e-5, lambda p, r, s: hd95(p, r, 3, s)),
    "monai/hd": (1e-5, lambda p, r, s: hausdorff(p, r, 3, s)),
    "monai/assd": (1e-5, lambda p, r, s: assd(p, r, 3, s)),
    "monai/nsd_1.0": (1e-6, lambda p, r, s: nsd(p, r, 3, s, 1.0)),
    "monai/nsd_2.5": (1e-6, lambda p, r, s: nsd(p, r, 3, s, 2.5)),
    "monai/nsd_1.0_subvoxels": (1e-6, lambda p, r, s: nsd(p, r, 3, s, 1.0, **AREA)),
    "monai/nsd_2.5_subvoxels": (1e-6, lambda p, r, s: nsd(p, r, 3, s, 2.5, **AREA)),
    "surface_distance/hd95": (1e-12, lambda p, r, s: hd95(p, r, 3, s, **AREA)),
    "surface_distance/hd": (1e-12, lambda p, r, s: hausdorff(p, r, 3, s, **AREA)),
    "surface_distance/asd_prediction_to_reference": (1e-12, lambda p, r, s: assd(p, r, 3, s, directed=True, **AREA)),
    "surface_distance/asd_reference_to_prediction": (1e-12, lambda p, r, s: assd(r, p, 3, s, directed=True, **AREA)),
    "surface_distance/nsd_1.0": (1e-12, lambda p, r, s: nsd(p, r, 3, s, 1.0, **AREA)),
    "surface_distance/nsd_2.5": (1e-12, lambda p, r, s: nsd(p, r, 3, s, 2.5, **AREA)),
}


def pair(name):
    golden = load_golden("surfaces.npz")
    return [golden[f"{name}/{part}"] for part in ("prediction", "reference", "spacing")], golden


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("metric", EQUAL)
def test_equal_to_the_package_also_for_empty_masks(name, metric):
    arrays, golden = pair(name)
    tolerance, ours = EQUAL[metric]
    np.testing.assert_allclose(ours(*arrays), golden[f"{name}/{metric}"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_dice_equals_surface_distance_but_for_an_empty_reference(name):
    (prediction, reference, _), golden = pair(name)
    present = [value for value in (1, 2, 3) if (reference == value).any()]
    theirs = golden[f"{name}/surface_distance/dice"][np.array(present) - 1]
    np.testing.assert_allclose(dice(prediction, reference, present), theirs, rtol=1e-12)
    # Where only the reference is empty it says 0, as ignore_empty=False does, and MONAI nan; where both are, nan.
    for value in {1, 2, 3} - set(present):
        expected = 0 if (prediction == value).any() else np.nan
        np.testing.assert_equal(golden[f"{name}/surface_distance/dice"][value - 1], expected)
        np.testing.assert_equal(dice(prediction, reference, [value]), [np.nan])


def test_the_definitions_are_not_the_same():
    """So that nobody takes one for the other: a far voxel, and a thin structure."""
    arrays, golden = pair("shifted")
    for metric, by_voxels in (("hd95", hd95(*arrays[:2], 3, arrays[2])), ("nsd_1.0", nsd(*arrays[:2], 3, arrays[2]))):
        assert (np.abs(by_voxels - golden[f"shifted/surface_distance/{metric}"]) > 0.05).all()


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 3.0), (2.2, 0.5, 1.3)])
def test_area_of_a_plane_and_of_a_ball(spacing):
    spacing = np.array(spacing)
    half = np.zeros((9, 8, 7), bool)
    half[:4] = True
    inner = codes_of(half)[4, 1:-1, 1:-1]
    np.testing.assert_allclose(areas_of(spacing)[inner], spacing[1] * spacing[2])
    assert inner.size == 7 * 6
    shape = np.array((90, 90, 60))
    radius = 0.35 * (shape * spacing / 2).min()
    places = (np.indices(shape).reshape(3, -1).T - shape / 2) * spacing
    ball = ((places**2).sum(axis=1) <= radius**2).reshape(shape)
    # Patches between voxels are steps, of more area than the sphere that they stand for.
    assert 1 < areas_of(spacing)[codes_of(ball)].sum() / (4 * np.pi * radius**2) < 1.25


def test_turning_or_mirroring_the_masks_changes_no_area():
    rng = np.random.default_rng(1)
    mask = rng.random((12, 10, 8)) < 0.4
    areas = areas_of(np.ones(3))
    total = areas[codes_of(mask)].sum()
    for turned in (mask[::-1], mask[:, ::-1], mask.transpose(2, 0, 1), np.rot90(mask, axes=(0, 2))):
        np.testing.assert_allclose(areas[codes_of(turned)].sum(), total)


def test_says_what_is_wrong():
    plane = np.zeros((4, 4), int)
    with pytest.raises(ConfigError, match="surface is 'area' of 2 axes"):
        hd95(plane, plane, 1, 1.0, surface="area")
    with pytest.raises(ConfigError, match="expected 'voxels' or 'area'"):
        nsd(plane, plane, 1, 1.0, surface="mesh")
