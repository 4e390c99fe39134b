import math

import numpy as np
import pytest
from scipy import stats

from mambahome_jax.evaluation.results import COMPARED, Score, compare_runs, wilcoxon_p


def row(case, label, dice, volume=1.0):
    return Score(case, label, f"s{label}", dice, 2.0, 1.0, 1.0, volume, 1.0)


def runs(better=0.05):
    base = np.random.default_rng(0).uniform(0.5, 0.9, (12, 2))
    other = [row(f"c{n}", label + 1, base[n, label]) for n in range(12) for label in range(2)]
    gain = better + np.random.default_rng(1).uniform(-0.01, 0.01, base.shape)
    ours = [row(f"c{n}", label + 1, base[n, label] + gain[n, label]) for n in range(12) for label in range(2)]
    return ours, other, gain


def test_differences_are_paired():
    ours, other, gain = runs()
    found = compare_runs(ours, other)
    assert set(found["metrics"]) == set(COMPARED)
    entry = found["metrics"]["dice"]["structures"]["s1"]
    assert entry["difference"] == pytest.approx(gain[:, 0].mean(), abs=1e-5)
    assert entry["median_difference"] == pytest.approx(np.median(gain[:, 0]), abs=1e-5)
    assert entry["mean"] - entry["other_mean"] == pytest.approx(entry["difference"])
    # The spread of the differences, not that of the scores, which is ten times as large.
    assert 0.04 < entry["low"] < entry["difference"] < entry["high"] < 0.06
    assert entry["p"] == pytest.approx(2 / 2**12)
    assert found["metrics"]["dice"]["overall"]["difference"] == pytest.approx(gain.mean(), abs=1e-5)
    assert found["metrics"]["hd95"]["overall"]["p"] == 1
    assert compare_runs(ours, other) == found


def test_what_only_one_side_has_is_named():
    ours, other, _ = runs()
    found = compare_runs([row("new", 1, 0.1), row("c0", 3, 0.2), *ours], [*other, row("old", 4, 0.9)])
    assert (found["only_here"], found["only_there"]) == (["new"], ["old"])
    assert (found["structures_only_here"], found["structures_only_there"]) == (["s3"], ["s4"])
    assert found["metrics"]["dice"]["overall"]["cases"] == 12
    assert list(found["metrics"]["dice"]["structures"]) == ["s1", "s2"]


def test_a_score_that_one_side_lacks_is_no_pair():
    ours, other, _ = runs()
    other[0] = row("c0", 1, math.nan)
    entry = compare_runs(ours, other)["metrics"]["dice"]["structures"]["s1"]
    assert entry["cases"] == 11
    assert entry["other_mean"] == pytest.approx(np.mean([score.dice for score in other[2::2]]), abs=1e-5)


def test_rounding_in_the_file_is_no_difference():
    ours, _, _ = runs()
    read = [row(score.case, score.label, float(f"{score.dice:.6g}")) for score in ours]
    entry = compare_runs(ours, read)["metrics"]["dice"]["overall"]
    assert (entry["difference"], entry["low"], entry["high"], entry["p"]) == (0, 0, 0, 1)


def test_volumes_are_compared_by_how_far_they_are_off():
    entry = compare_runs([row("a", 1, 1.0, 0.5)], [row("a", 1, 1.0, 1.5)])
    assert entry["metrics"]["absolute_volume_difference_ml"]["overall"]["difference"] == 0


def test_wilcoxon():
    differences = np.random.default_rng(0).normal(0.2, 1, 30)
    assert wilcoxon_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert wilcoxon_p(np.append(differences, [0, np.nan])) == wilcoxon_p(differences)
    assert wilcoxon_p(np.zeros(3)) == 1
    assert math.isnan(wilcoxon_p(np.array([np.nan])))
