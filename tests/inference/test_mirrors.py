"""Mirrors of windows: which axes, which labels trade places, and the mean against NumPy's."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.ensemble import class_order, mirrored, mirrors_for
from mambahome_jax.inference.segment import Segmenter, SegmentOptions, segment
from tests.inference.models import Levels

KIDNEYS = {1: "liver", 2: "kidney_left", 3: "kidney_right"}


def sided(windows):
    """Class 2 left of the window's middle, 3 right of it, where the input is 1. Axes run R, A, S."""
    half = np.where(np.arange(windows.shape[1]) < windows.shape[1] // 2, 1.0, 0.0)[None, :, None, None]
    image = windows[..., 0]
    return jnp.stack([0.5 - image, image * 0 - 1, image * half, image * (1 - half)], axis=-1)


def test_axes_follow_the_orientation_and_the_names():
    assert mirrors_for(KIDNEYS, "RAS") == (((0, ((2, 3),)), (1, ()), (2, ())), ())
    assert mirrors_for(KIDNEYS, "ILP") == (((0, ()), (1, ((2, 3),)), (2, ())), ())
    mirrors, (remark,) = mirrors_for({1: "left atrium", 2: "aorta"}, "RAS")
    assert mirrors == ((1, ()), (2, ())) and "left-right" in remark and "left atrium" in remark
    mirrors, (remark,) = mirrors_for({}, "LPS")
    assert mirrors == ((1, ()), (2, ())) and "no names" in remark
    mirrors, (remark,) = mirrors_for({1: "anterior leaflet"}, "RAS")
    assert mirrors == ((0, ()), (2, ())) and "front-back" in remark


class Described(nnx.Module):
    """What is asked for its metadata alone."""

    def __call__(self, windows):
        raise NotImplementedError


def test_only_axes_mirrored_in_training_are_mirrored():
    mirrors, remarks = mirrors_for(KIDNEYS, "RAS", ("LR",))
    assert mirrors == ((0, ((2, 3),)),)
    assert ["--mirror AP" in remarks[0], "--mirror IS" in remarks[1]] == [True, True]

    def network(**data):
        model = Described()
        model.metadata = nnx.static(DataProperties(labels=tuple(KIDNEYS.items()), **data)) if data else None
        return model

    def mirrors_of(model):
        return Segmenter.of(model, SegmentOptions(tta=True)).settings.mirrors

    assert mirrors_of(network(mirror=("LR", "IS"))) == ((0, ((2, 3),)), (2, ()))
    both = [network(mirror=("LR", "IS")), network(mirror=("AP", "LR"))]
    assert mirrors_of(both) == ((0, ((2, 3),)),)
    unmirrored = Segmenter.of(network(), SegmentOptions(tta=True))
    assert unmirrored.settings.mirrors == () and len(unmirrored.remarks) == 3


def test_without_mirrors_nothing_is_changed():
    assert mirrored(sided, ()) is sided


def test_a_symmetric_predictor_stays_as_it_is():
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 8, 6, 4, 1)), jnp.float32)
    mirrors, _ = mirrors_for(KIDNEYS, "RAS")
    np.testing.assert_allclose(mirrored(sided, mirrors)(windows), sided(windows), rtol=0, atol=1e-6)
    # Without the swap the two kidneys would cancel out.
    unswapped = mirrored(sided, [(0, ())])(windows)
    assert np.abs(unswapped - sided(windows)).max() > 0.4


def test_the_mean_is_that_of_all_eight():
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(1, 4, 3, 5, 1)).astype(np.float32)
    scale = rng.normal(size=4).astype(np.float32)
    windows = rng.normal(size=(2, 4, 3, 5, 1)).astype(np.float32)

    def predict(x):
        return x * weights * scale

    expected = np.zeros((2, 4, 3, 5, 4))
    for flips in np.ndindex(2, 2, 2):
        axes = [axis + 1 for axis in range(3) if flips[axis]]
        back = np.flip(np.asarray(predict(np.flip(windows, axes))), axes)
        expected += back[..., [0, 1, 3, 2]] if flips[1] else back
    mean = mirrored(predict, [(0, ()), (1, ((2, 3),)), (2, ())])(jnp.asarray(windows))
    np.testing.assert_allclose(mean, expected / 8, rtol=0, atol=1e-6)


def test_pairs_of_two_axes_are_both_swapped():
    np.testing.assert_array_equal(class_order([(0, ((1, 2), (3, 4))), (1, ((1, 3), (2, 4)))], 5), [0, 4, 3, 2, 1])
    with pytest.raises(ConfigError, match="the labels name 4, but the network has 3 classes"):
        class_order([(0, ((3, 4),))], 3)


def test_segment_mirrors_and_says_what_it_leaves_out():
    volume = Volume(np.random.default_rng(2).integers(0, 2, (16, 32, 16)).astype(np.float32), np.eye(4))
    options = {"roi_size": (16, 32, 16), "modality": "us", "spacing": (0, 0, 0)}
    properties = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")), mirror=("LR", "AP", "IS"))
    model = Levels((0.0, 0.5, 1.0), metadata=properties)
    plain = segment(model, volume, **options)
    np.testing.assert_array_equal(segment(model, volume, tta=True, **options).array, plain.array)
    assert set(np.unique(plain.array)) == {0, 2}
    with pytest.warns(UserWarning, match="left-right axis out"):
        unnamed = Levels((0.0, 0.5, 1.0), metadata=DataProperties(spacing=None, mirror=("LR", "AP", "IS")))
        segment(unnamed, volume, tta=True, **options)
