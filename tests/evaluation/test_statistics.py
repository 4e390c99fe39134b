import math

import numpy as np
import pytest

from mambahome_jax.evaluation.results import DESCRIBED, Score, bootstrap_means, describe, finite_median, mean_intervals


def row(case, label, dice, assd=1.0, volume=1.0, reference=1.0):
    return Score(case, label, f"s{label}", dice, 2.0, assd, 1.0, volume, reference)


def test_mean_median_and_interval_of_each_structure_and_of_all():
    dice = np.random.default_rng(0).uniform(0.5, 1, (30, 2))
    scores = [row(f"c{case}", label + 1, dice[case, label]) for case in range(30) for label in range(2)]
    found = describe(scores)
    assert set(found["overall"]) == set(DESCRIBED)
    for label, name in enumerate(("s1", "s2")):
        entry = found["structures"][name]["dice"]
        assert entry["mean"] == pytest.approx(dice[:, label].mean())
        assert entry["median"] == pytest.approx(np.median(dice[:, label]))
        half = 1.96 * dice[:, label].std() / math.sqrt(30)
        assert entry["low"] == pytest.approx(entry["mean"] - half, abs=0.25 * half)
        assert entry["high"] == pytest.approx(entry["mean"] + half, abs=0.25 * half)
        assert entry["cases"] == 30
    assert found["overall"]["dice"]["mean"] == pytest.approx(dice.mean())
    assert found["overall"]["dice"]["median"] == pytest.approx(np.median(dice, axis=0).mean())
    assert describe(scores) == found
    assert describe(scores, seed=1) != found


def test_cases_are_drawn_whole():
    """Structures that are opposite in every case: their mean does not vary, however the cases are drawn."""
    values = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    columns, total = mean_intervals(values)
    assert total == pytest.approx((0.5, 0.5))
    assert columns[0][0] < columns[0][1]


def test_what_is_not_finite_is_left_out():
    scores = [
        row("a", 1, 0.5, math.inf, volume=0.5),
        row("b", 1, 0.7, 3.0, volume=2.0),
        row("c", 1, math.nan, volume=1.0),
        row("c", 2, math.nan, math.nan),
    ]
    found = describe(scores)
    assert found["structures"]["s1"]["dice"]["mean"] == pytest.approx(0.6)
    assert found["structures"]["s1"]["dice"]["cases"] == 2
    assert found["structures"]["s1"]["assd"]["mean"] == pytest.approx(2.0)
    assert found["structures"]["s1"]["volume_difference_ml"]["median"] == 0
    assert math.isnan(found["structures"]["s2"]["dice"]["median"])
    assert found["overall"]["dice"]["mean"] == pytest.approx(0.6)


def test_no_interval_for_one_case_or_none():
    entry = describe([row("a", 1, 0.5)])["overall"]["dice"]
    assert (entry["mean"], entry["cases"]) == (0.5, 1)
    assert math.isnan(entry["low"]) and math.isnan(entry["high"])
    assert math.isnan(describe([])["overall"]["dice"]["mean"])
    assert math.isnan(finite_median(np.array([np.inf])))


def test_draws_without_a_value_have_no_mean():
    means = bootstrap_means(np.array([[1.0], [np.nan]]), resamples=300)
    assert means.shape == (300, 1)
    assert np.isnan(means).any() and (means[np.isfinite(means)] == 1).all()
