import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mambahome_jax.errors import ConfigError
from mambahome_jax.evaluation import metrics
from mambahome_jax.evaluation.metrics import assd, dice, hausdorff, hd95, nsd
from tests.conftest import load_golden

RESULTS = {
    "dice_ignore_empty1": (1e-5, lambda p, r, s: dice(p, r, 3, s)),
    "dice_ignore_empty0": (1e-5, lambda p, r, s: dice(p, r, 3, s, ignore_empty=False)),
    "hd95": (1e-4, lambda p, r, s: hd95(p, r, 3, s)),
    "hd": (1e-4, lambda p, r, s: hausdorff(p, r, 3, s)),
    "hd95_pred_to_ref": (1e-4, lambda p, r, s: hausdorff(p, r, 3, s, percentile=95, directed=True)),
    "assd": (1e-4, lambda p, r, s: assd(p, r, 3, s)),
    "asd_pred_to_ref": (1e-4, lambda p, r, s: assd(p, r, 3, s, directed=True)),
    "nsd_1mm": (1e-5, lambda p, r, s: nsd(p, r, 3, s)),
    "nsd_2mm": (1e-5, lambda p, r, s: nsd(p, r, 3, s, 2.0)),
}
LABEL_MAPS = arrays(np.uint8, (7, 6, 5), elements=st.integers(0, 2))


@pytest.mark.parametrize("pair", ["generic", "empty_pred", "empty_ref", "some_empty", "border", "real"])
@pytest.mark.parametrize("name", RESULTS)
def test_equals_monai(pair, name):
    golden = load_golden("pipeline/metrics.npz")
    if f"{pair}/ref" not in golden:
        pytest.skip(f"the pair {pair!r} is cut from a real scan and not kept here; it is in ../shared/parity")
    tolerance, function = RESULTS[name]
    result = function(golden[f"{pair}/pred"], golden[f"{pair}/ref"], golden[f"{pair}/spacing"])
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, golden[f"{pair}/{name}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", ["C", "F"])
def test_equals_monai_with_a_tolerance_for_each_class(order):
    golden = {k[8:]: v for k, v in load_golden("layers_tiny.npz").items() if k.startswith("metrics/")}
    for sample in range(3):
        maps = [np.asarray(golden[name][sample], order=order) for name in ("pred", "gt")]
        spacing = golden["spacing"]
        for name, result, tolerance in (
            ("dice_ignore_empty", dice(*maps, 3), 1e-5),
            ("dice_keep_empty", dice(*maps, 3, ignore_empty=False), 1e-5),
            ("hd95", hd95(*maps, 3, spacing), 1e-4),
            ("hd95_unit_spacing", hd95(*maps, 3, 1.0), 1e-4),
            ("hd", hausdorff(*maps, 3, spacing), 1e-4),
            ("nsd", nsd(*maps, 3, spacing, golden["nsd_thresholds"]), 1e-5),
        ):
            np.testing.assert_allclose(result, golden[name][sample], rtol=0, atol=tolerance, err_msg=name)


@settings(max_examples=30)
@given(LABEL_MAPS, LABEL_MAPS)
def test_symmetric_and_bounded(a, b):
    spacing = (0.7, 1.1, 2.5)
    for function in (hd95, assd, nsd):
        np.testing.assert_allclose(function(a, b, 2, spacing), function(b, a, 2, spacing), rtol=1e-12)
    both = [label for label in (1, 2) if (a == label).any() and (b == label).any()]
    if both:
        np.testing.assert_array_equal(dice(a, b, both), dice(b, a, both))
        assert (hd95(a, b, both, spacing) <= hausdorff(a, b, both, spacing)).all()
    present = [label for label in (1, 2) if (a == label).any()]
    if present:
        np.testing.assert_array_equal(dice(a, a, present), 1)
        np.testing.assert_array_equal(hd95(a, a, present, spacing), 0)


@settings(max_examples=30)
@given(LABEL_MAPS, LABEL_MAPS)
def test_tree_and_distance_transform_agree(a, b):
    if not (a == 1).any() or not (b == 1).any():
        return
    spacing = np.array((0.8, 1.25, 3.0))
    surfaces = [metrics._surface(m == 1) for m in (a, b)]
    small = metrics._distances(*surfaces, spacing)
    # Much empty space around makes the tree the cheaper way; the distances stay the same.
    large = metrics._distances(*(np.pad(s, 20) for s in surfaces), spacing)
    np.testing.assert_allclose(np.sort(small), np.sort(large), rtol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_shifted_cube_is_shift_times_spacing_away(axis):
    spacing = np.array((0.5, 1.25, 3.0))
    reference = np.zeros((40, 40, 40), np.int16)
    reference[10:20, 10:20, 10:20] = 7
    prediction = np.roll(reference, 3, axis)
    expected = 3 * spacing[axis]
    np.testing.assert_allclose(hausdorff(prediction, reference, [7], spacing), expected)
    np.testing.assert_allclose(hd95(prediction, reference, [7], spacing), expected)
    assert nsd(prediction, reference, [7], spacing, expected) == 1
    assert nsd(prediction, reference, [7], spacing, expected * 0.999) < 1
    assert 0 < assd(prediction, reference, [7], spacing)[0] < expected
    np.testing.assert_allclose(dice(prediction, reference, [7]), 0.7)


def test_tolerance_is_inclusive_in_spite_of_rounding():
    reference = np.zeros((60, 9, 9), bool)
    reference[2:14, 2:6, 2:6] = True
    # 0.1 * 13 - 0.1 * 3 is above 1.0 in floating point, 0.1 * (13 - 3) is not.
    assert nsd(np.roll(reference, 10, 0), reference, 1, (0.1, 5, 5), 1.0) == 1


def test_border_voxels_are_surface():
    full = np.ones((4, 4, 4), np.uint8)
    assert metrics._surface(full.astype(bool)).sum() == 4**3 - 2**3


def test_labels_as_number_or_values_and_dtypes():
    reference = np.zeros((6, 6, 6), np.uint8)
    reference[1:3], reference[4] = 1, 3
    prediction = reference.astype(np.float32)
    np.testing.assert_array_equal(dice(prediction, reference, 3), [1, np.nan, 1])
    np.testing.assert_array_equal(dice(prediction, reference, (3, 1)), [1, 1])
    np.testing.assert_array_equal(dice(reference.astype(np.int64), reference == 1, [1]), [1])
    np.testing.assert_array_equal(dice(reference.astype(np.int64) - 5, reference, [1]), [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((4, 4, 5), int)}, "prediction has shape"),
        ({"prediction": np.full((4, 4, 4), 0.5)}, "fractions"),
        ({"prediction": np.full((4, 4, 4), np.nan)}, "NaN"),
        ({"prediction": np.full((4, 4, 4), "a")}, "dtype"),
        ({"reference": np.int64(3)}, "single number"),
        ({"classes": 0}, "classes is 0"),
        ({"classes": [0, 1]}, "classes is"),
        ({"classes": [70000]}, "classes is"),
        ({"spacing": (1, 1)}, "one for each of 3 axes"),
        ({"spacing": (1, 0, 1)}, "positive numbers"),
        ({"spacing": (1, np.nan, 1)}, "positive numbers"),
        ({"tolerance_mm": -1}, "0 or more"),
        ({"tolerance_mm": (1, 2)}, "one for each of 3"),
    ],
)
def test_says_what_is_wrong(change, message):
    zeros = np.zeros((4, 4, 4), int)
    arguments = {
        "prediction": zeros,
        "reference": zeros,
        "classes": 3,
        "spacing": (1, 1, 1),
        "tolerance_mm": 1,
    } | change
    with pytest.raises(ConfigError, match=message):
        nsd(**arguments)
