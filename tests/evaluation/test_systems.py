"""Differences between systems: by hand where there is little, by repetition where there is chance."""

import numpy as np
import pytest

from mambahome_jax.evaluation.results import Score
from mambahome_jax.evaluation.systems import compare_systems, holm, paired_interval, verdict


def scores(dice, hd95=1.0):
    """Of (cases, structures)."""
    rows = np.ndenumerate(np.asarray(dice, float))
    return [Score(f"c{case:02d}", n + 1, f"s{n + 1}", value, hd95, 1.0, 1.0, 1.0, 1.0) for (case, n), value in rows]


def test_the_difference_of_each_case_and_of_all():
    ours, theirs = [scores([[0.8, 0.6], [0.9, 0.5]])], [scores([[0.7, 0.6], [0.6, 0.6]])]
    found = compare_systems(ours, theirs, "dice")
    assert (found.mean, found.other) == pytest.approx((0.7, 0.625))
    assert found.difference == pytest.approx(0.075)
    assert found.of_cases == pytest.approx({"c00": 0.05, "c01": 0.1})
    assert (found.low, found.high) == pytest.approx((0.05, 0.1))
    assert compare_systems(ours, theirs, "dice", "s2").of_cases == pytest.approx({"c00": 0.0, "c01": -0.1})
    assert compare_systems(ours, theirs, "hd95").difference == 0


def test_what_one_side_lacks_counts_on_neither():
    whole = scores([[0.8, 0.6], [0.9, 0.5], [0.4, 0.4]])
    part = [row for row in scores([[0.8, 0.1], [0.9, 0.5]]) if (row.case, row.label) != ("c00", 2)]
    found = compare_systems([whole], [part], "dice")
    assert found.of_cases == pytest.approx({"c00": 0.0, "c01": 0.0}) and found.p == 1
    assert (found.mean, found.difference) == pytest.approx((0.75, 0.0))
    other_seed = compare_systems([whole, part], [whole], "dice")
    assert other_seed.of_cases == pytest.approx({"c00": 0.0, "c01": 0.0})


def test_the_mean_over_seeds_is_compared_and_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, (20, 1))
    alike = [scores(base + 0.01)] * 3, [scores(base)] * 3
    found = compare_systems(*alike, "dice")
    assert (found.low, found.high) == pytest.approx((0.01, 0.01)) and found.p < 1e-4
    moved = [scores(base + 0.01 + shift) for shift in (-0.02, 0.0, 0.02)], [scores(base)] * 3
    found = compare_systems(*moved, "dice")
    assert found.difference == pytest.approx(0.01) and found.low < 0 < found.high


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        cases = rng.normal(0.8, 0.1, 40)
        ours, theirs = (cases + shift + rng.normal(0, 0.02, (1, 40)) for shift in (0.005, 0.0))
        low, high = paired_interval(ours, theirs, resamples=500)
        held += low <= 0.005 <= high
    assert 87 <= held <= 99


@pytest.mark.parametrize(("cases", "stands"), [(2, False), (5, False), (6, True)])
def test_few_cases_that_all_differ_the_same_way_tell_nothing(cases, stands):
    base = np.linspace(0.5, 0.9, cases)[:, None]
    moved = base + np.linspace(0.02, 0.05, cases)[:, None]
    found = compare_systems([scores(moved)], [scores(base)], "dice")
    assert found.low > 0 and found.distinguishable == stands


@pytest.mark.parametrize(("seeds", "least"), [(2, 168), (3, 178)])
def test_few_seeds_are_not_taken_for_the_whole_of_chance(seeds, least):
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        cases = rng.normal(0.8, 0.1, 40)
        ours, theirs = (cases + rng.normal(0, 0.02, (seeds, 40)) + rng.normal(0, 0.01, (seeds, 1)) for _ in range(2))
        low, high = paired_interval(ours, theirs, resamples=500)
        held += low <= 0 <= high
    assert held >= least


def test_verdicts():
    base = np.linspace(0.5, 0.9, 10)[:, None]
    noise = np.tile([[0.02], [-0.02]], (5, 1))

    def said(ours, seeds=1):
        return verdict("conv", "scan", compare_systems([scores(ours)] * seeds, [scores(base)], "dice"), seeds)

    assert said(base + 0.02).startswith(
        "conv is better than scan: Dice +0.0200, 95 % interval +0.0200 to +0.0200, p 0.002, over"
    )
    assert said(base - 0.02 + noise / 4).startswith("conv is worse than scan: Dice -0.0200")
    assert said(base + 0.02).endswith("over 10 cases and 1 seed; another seed may change that")
    assert said(base + 0.02, seeds=2).endswith("over 10 cases and 2 seeds")
    text = said(base + noise, seeds=2)
    assert text.startswith("conv and scan are not distinguishable: Dice ") and text.endswith(
        "over 10 cases and 2 seeds"
    )
    alone = compare_systems([scores([[0.9]])], [scores([[0.5]])], "dice")
    assert "not distinguishable over 1 case and 1 seed, which give no interval" in verdict("a", "b", alone, 1)
    assert np.isnan(compare_systems([scores([[np.nan]])], [scores([[0.5]])], "dice").difference)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    # By hand: 0.01 x 3, 0.02 x 2, 0.03 x 1 raised to the one before; what has no p is no test.
    assert holm([0.02, np.nan, 0.01, 0.03]) == pytest.approx([0.04, np.nan, 0.03, 0.04], nan_ok=True)
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []
