"""Scans that are the same under two names, in another form."""

from dataclasses import replace

import numpy as np
import pytest

from mambahome_jax.datasets.label_map import near_duplicates, thumbnail_of
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume
from tests.preprocessing.test_findings import dataset as empty
from tests.preprocessing.test_findings import dataset_findings, facts, found

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def body(seed, noise=20.0):
    """A soft body with a texture of its own, of about 100 in spread."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 60, (5, 5, 4))
    texture = np.kron(coarse, np.ones((8, 8, 6)))
    x, y, z = (
        np.linspace(-1, 1, n)[tuple(slice(None) if i == a else None for i in range(3))]
        for a, n in enumerate(texture.shape)
    )
    return np.where(x**2 + y**2 + z**2 < 1, 300 + texture, 0) + np.random.default_rng(seed + 100).normal(
        0, noise, texture.shape
    )


def alike(one, other):
    volumes = {"a": one, "b": other}
    thumbnails = {name: thumbnail_of(volume) for name, volume in volumes.items()}
    shapes = {name: reorient(volume, "RAS").shape for name, volume in volumes.items()}
    return near_duplicates(thumbnails, shapes) == [("b", "a")]


SCAN = Volume(body(0), AFFINE)


@pytest.mark.parametrize(
    "other",
    [
        Volume(np.round(body(0)), AFFINE),
        Volume(body(0) * 0.37 + 1024, AFFINE),
        reorient(SCAN, "LPS"),
        reorient(SCAN, "SAL"),
        Volume(np.stack([body(0), body(1)], axis=-1), AFFINE),
        Volume(body(0).astype(np.float32), np.diag([0.9, 0.9, 5, 1.0])),
    ],
    ids=["rounded", "scaled", "LPS", "SAL", "first channel", "other spacing"],
)
def test_another_form_of_a_scan_is_known_again(other):
    assert alike(SCAN, other)


@pytest.mark.parametrize(
    "other",
    [
        Volume(body(1), AFFINE),
        Volume(body(0) + np.random.default_rng(1).normal(0, 20, SCAN.shape), AFFINE),
        Volume(body(0)[:, :, :-1], AFFINE),
        Volume(body(0)[::-1], AFFINE),
    ],
    ids=["another body", "another acquisition", "another shape", "mirrored"],
)
def test_another_scan_is_another(other):
    assert not alike(SCAN, other)


def test_what_is_too_plain_is_not_compared():
    plain = np.zeros((20, 20, 20))
    plain[8:12, 8:12, 8:12] = 1
    assert thumbnail_of(Volume(plain, AFFINE)) is None and thumbnail_of(Volume(plain * 0, AFFINE)) is None
    assert thumbnail_of(Volume(np.full((2, 2, 2), np.nan), AFFINE)) is None
    assert thumbnail_of(Volume(np.random.default_rng(0).normal(size=(3, 4, 1)), AFFINE)).shape == (512,)


def test_check_names_both_and_leaves_equal_digests_to_the_other_finding():
    seen = thumbnail_of(SCAN)
    cases = [
        replace(facts(name, digest=digest), thumbnail=seen) for name, digest in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    assert [(kind, case, text) for _, kind, case, text in found(cases)] == [
        ("duplicate", "c", "the same image as a"),
        ("duplicate", "b", "but for rounding, scaling or the order of axes the same image as a"),
    ]
    cases[1] = replace(cases[1], split="test")
    assert dataset_findings(empty(), cases)[1].kind == "leak"
