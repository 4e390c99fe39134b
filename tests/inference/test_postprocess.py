"""Structures chosen by name, the largest connected part, volumes."""

import numpy as np
import pytest

from mambahome_jax.config import DataProperties
from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.postprocess import keep_labels, keep_largest, postprocess, values_named, volumes_ml
from mambahome_jax.inference.segment import segment
from tests.inference.models import Levels

NAMES = {1: "liver", 2: "kidney_left", 3: "kidney_right"}


def parts(labels, value):
    """Sizes of the connected parts of a structure, by flooding from voxel to voxel."""
    left = {tuple(voxel) for voxel in np.argwhere(labels == value)}
    sizes = []
    while left:
        front, size = [left.pop()], 0
        while front:
            voxel = front.pop()
            size += 1
            near = {tuple(np.add(voxel, step) - 1) for step in np.ndindex(3, 3, 3)} & left
            left -= near
            front += near
        sizes.append(size)
    return sorted(sizes)


@pytest.mark.parametrize("values", [None, (1, 3), ()])
def test_the_largest_part_stays(values):
    labels = np.random.default_rng(0).choice(4, (9, 8, 7), p=[0.79, 0.07, 0.07, 0.07]).astype(np.uint8)
    kept = keep_largest(labels[::-1].transpose(2, 0, 1), values).transpose(1, 2, 0)[::-1]
    assert kept.dtype == np.uint8
    for value in (1, 2, 3):
        sizes = parts(labels, value)
        assert len(sizes) > 2
        assert parts(kept, value) == (sizes[-1:] if values is None or value in values else sizes)
    assert (kept[kept > 0] == labels[kept > 0]).all()


def test_corners_connect_and_values_may_be_large():
    labels = np.zeros((6, 6, 6), np.uint16)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[5, 5, 5] = 300
    kept = keep_largest(labels)
    assert (kept[0, 0, 0], kept[1, 1, 1], kept[5, 5, 5]) == (300, 300, 0)
    np.testing.assert_array_equal(keep_labels(labels, [300]), labels)
    assert not keep_labels(labels, [1]).any()


def test_names_are_found_however_they_are_written():
    assert values_named(["Left Kidney", "liver"], NAMES) == (1, 2)
    assert values_named("kidney-r", NAMES) == (3,)
    assert values_named(["3"], NAMES) == values_named(["label_3"], {}, 4) == values_named(["3"], {}) == (3,)
    with pytest.raises(ConfigError, match=r"--keep_largest heart: .* expected some of liver, kidney_left"):
        values_named(["heart"], NAMES, flag="keep_largest")
    with pytest.raises(ConfigError, match="--labels 4: the model has no such structure; expected some of label_1"):
        values_named(["4"], {}, 4)
    with pytest.raises(ConfigError, match="no names"):
        values_named(["heart"], {})


def test_nothing_asked_for_is_nothing_done():
    volume = Volume(np.ones((2, 2, 2), np.uint8), np.eye(4))
    assert postprocess(volume) is volume


def test_volumes():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[:2], labels[3, 3, 3] = 1, 9
    assert volumes_ml(Volume(labels, np.diag([2.0, -3.0, 4.0, 1.0])), NAMES) == {
        "liver": 32 * 0.024,
        "kidney_left": 0,
        "kidney_right": 0,
        "label_9": 0.024,
    }


def test_segment_takes_names():
    levels = np.zeros((16, 16, 32), np.float32)
    levels[1:5, 1:5, 1:9], levels[1:5, 8:12, 1:9], levels[12:14, 12:14, 12:14] = 0.5, 1, 1
    properties = DataProperties(spacing=None, labels=((1, "liver"), (2, "spleen")))
    model, options = Levels((0.0, 0.5, 1.0), metadata=properties), {"roi_size": (16, 16, 32), "modality": "us"}
    plain = segment(model, Volume(levels, np.eye(4)), **options).array
    np.testing.assert_array_equal(plain, levels * 2)
    spleen = segment(model, Volume(levels, np.eye(4)), labels=["Spleen"], **options).array
    np.testing.assert_array_equal(spleen, np.where(levels == 1, 2, 0))
    for wanted in ("all", ["all"], ["spleen"], "spleen"):
        kept = segment(model, Volume(levels, np.eye(4)), keep_largest=wanted, **options).array
        expected = plain.copy()
        expected[12:14, 12:14, 12:14] = 0
        np.testing.assert_array_equal(kept, expected)
    with pytest.raises(ConfigError, match="--labels heart"):
        segment(model, Volume(levels, np.eye(4)), labels=["heart"], **options)
