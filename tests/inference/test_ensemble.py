"""An ensemble is the mean of its members' probabilities, and refuses strangers."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import CheckpointError, ConfigError
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.ensemble import Ensemble, log_mean_softmax
from mambahome_jax.inference.segment import segment
from tests.inference.models import Levels

ROI = {"roi_size": (16, 16, 32), "modality": "us", "spacing": (0, 0, 0), "overlap": 0.25}


def scan(seed=0, shape=(20, 18, 24)):
    return Volume(np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32), np.diag([1.0, 1.2, 2.0, 1.0]))


def test_the_mean_of_probabilities():
    rng = np.random.default_rng(0)
    members = [rng.normal(scale=5, size=(4, 3, 5, 6)).astype(np.float32) for _ in range(3)]
    expected = np.mean([softmax(member.astype(np.float64), axis=-1) for member in members], axis=0)
    found = np.asarray(log_mean_softmax([jnp.asarray(member) for member in members]))
    np.testing.assert_allclose(softmax(found.astype(np.float64), axis=-1), expected, rtol=0, atol=1e-6)


def test_far_logits_do_not_overflow():
    far = jnp.asarray([[[[0.0, 1e4, -1e4]]]], jnp.float32)
    found = softmax(np.asarray(log_mean_softmax([far, -far])), axis=-1)
    np.testing.assert_allclose(found, [[[[0, 0.5, 0.5]]]], atol=1e-6)


def test_one_member_keeps_its_logits():
    logits = jnp.ones((1, 1, 1, 2))
    assert log_mean_softmax([logits]) is logits


def test_members():
    a, b = Levels((0.0, 0.5, 1.0)), Levels((0.0, 0.9, 1.0))
    assert Ensemble.of(a).members == (a,) and Ensemble.of([a, b]).members == (a, b)
    with pytest.raises(ConfigError, match="no model"):
        Ensemble.of([])
    with pytest.raises(ConfigError, match="model is a str; expected what load_model gives"):
        Ensemble.of("run/checkpoints/best")


def test_segment_takes_several_models(tmp_path):
    volume = scan()
    models = [Levels((0.0, 0.5, 1.0)), Levels((0.0, 0.9, 1.0)), Levels((0.4, 0.1, 0.3))]
    shares = []
    for number, given in enumerate([*models, models]):
        path = tmp_path / f"{number}.npz"
        result = segment(given, volume, save_probabilities=path, chain="trained", **ROI)
        with np.load(path) as archive:
            shares.append(archive["probabilities"].astype(np.float64))
    # The logits of one model are blended over windows before the softmax, here and there alike.
    np.testing.assert_allclose(shares[3], np.mean(shares[:3], axis=0), rtol=0, atol=1e-3)
    mean = np.mean(shares[:3], axis=0)
    two = np.sort(mean, axis=-1)
    clear = two[..., -1] - two[..., -2] > 2e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(result.array[clear], mean.argmax(-1)[clear])


def test_the_same_model_twice_changes_nothing_and_counts_its_windows():
    volume, model, seen = scan(1), Levels((0.0, 0.5, 1.0)), []
    options = ROI | {"spacing": (1.5, 1.5, 1.5), "chain": "trained"}
    alone = segment(model, volume, **options)
    twice = segment([model, model], volume, progress=lambda *counts: seen.append(counts), **options)
    np.testing.assert_array_equal(twice.array, alone.array)
    total = seen[-1][1]
    assert seen[-1] == (total, total) and {n for _, n in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_strangers_are_refused_by_name():
    first = DataProperties(spacing=(1, 1, 3), labels=((1, "liver"),))
    for other, message in [
        (DataProperties(spacing=(1, 1, 1), labels=((1, "liver"),)), "spacing 1 x 1 x 1 mm against 1 x 1 x 3 mm$"),
        (DataProperties(spacing=(1, 1, 3), labels=((1, "spleen"),)), "labels 1 spleen against 1 liver$"),
        (DataProperties(spacing=(1, 1, 3), labels=((1, "liver"),), modality="mr"), "modality mr against ct$"),
        (None, "preparation of scans published against trained$"),
    ]:
        members = [Levels((0.0, 1.0), metadata=first), Levels((0.0, 1.0), metadata=other)]
        with pytest.raises(ConfigError, match=message) as raised:
            Ensemble.of(members, ["one", "two"])
        assert str(raised.value).startswith("two cannot be joined with one: ")
    classes = [Levels((0.0, 1.0)), Levels((0.0, 1.0), in_chans=2)]
    with pytest.raises(ConfigError, match="model 2 cannot be joined with model 1: input channels 2 against 1"):
        segment(classes, scan())
    with pytest.raises(ConfigError, match="3 and 2 classes"):
        segment([lambda x: jnp.repeat(x, 3, -1), lambda x: jnp.repeat(x, 2, -1)], scan(), **ROI)


def test_the_member_with_damaged_weights_is_named():
    with pytest.raises(CheckpointError, match="network 2 of 2"):
        segment([Levels((0.0, 1.0)), Levels((0.0, np.inf))], scan(), **ROI)
