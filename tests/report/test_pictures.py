import base64
import io

import numpy as np
import pytest
from PIL import Image

from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.report.pictures import PANEL_PIXELS, PREDICTION, REFERENCE, draw_planes

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])  # axes run L, P, S


def cube(shift=0, label=1):
    array = np.zeros((40, 36, 20), np.uint8)
    array[10 + shift : 20 + shift, 10:20, 5:15] = label
    return Volume(array, AFFINE)


def pixels(panel):
    return np.asarray(Image.open(io.BytesIO(panel.png)))


def has(panel, colour):
    return (pixels(panel) == colour).all(axis=-1)


def test_three_planes_with_both_outlines():
    panels = draw_planes(cube(4), cube())
    assert [panel.caption.split(",")[0] for panel in panels] == ["axial", "coronal", "sagittal"]
    assert max(max(pixels(panel).shape[:2]) for panel in panels) == PANEL_PIXELS
    for panel in panels[:2]:
        # The reference lies on the patient's right, which is the picture's left.
        here, there = (np.flatnonzero(has(panel, colour).any(axis=0)) for colour in (REFERENCE, PREDICTION))
        assert here.min() < there.min() and here.max() < there.max()
        assert "differ in 80 voxels" in panel.description
        assert base64.b64decode(panel.uri.partition(",")[2]) == panel.png


def test_the_slice_where_the_maps_differ_most_is_shown():
    prediction = cube()
    prediction.array[10:20, 10:20, 14] = 0
    assert draw_planes(prediction, cube())[0].caption == "axial, slice 15 of 20"


def test_any_orientation_gives_the_same_picture():
    expected = draw_planes(cube(3), cube())
    turned = draw_planes(reorient(cube(3), "PSR"), reorient(cube(), "PSR"))
    assert [panel.png for panel in turned] == [panel.png for panel in expected]


def test_the_scan_lies_below():
    image = Volume(np.full((40, 36, 20), 50.0, np.float32), AFFINE)
    corner = pixels(draw_planes(cube(), cube(), image, (0.0, 100.0))[0])[0, 0]
    assert corner.tolist() == [127, 127, 127]


def test_values_that_are_not_labelled_do_not_count():
    prediction = cube()
    prediction.array[30:, 30:, 10:] = 2
    everything, labelled = (draw_planes(prediction, cube(), labels=labels)[0] for labels in (None, [1]))
    assert "differ in 60 voxels" in everything.description
    assert "differ in 0 voxels" in labelled.description


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 4, 1)])
def test_nothing_to_see(shape):
    empty = Volume(np.zeros(shape, np.uint8), np.eye(4))
    assert len(draw_planes(empty, empty)) == 3
