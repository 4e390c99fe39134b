import base64
import io

import numpy as np
import pytest
from PIL import Image

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.pictures import (
    PANEL_PIXELS,
    PREDICTION,
    PREVIEW_PIXELS,
    REFERENCE,
    colour_of,
    colours_of,
    draw_planes,
    render,
    show,
    write_preview,
)
from mambahome_jax.imaging.volume import Volume

NAMES = {1: "liver", 2: "spleen"}


def scan():
    """A box of label 1 on the patient's left, 2 on the right; both in the upper front."""
    labels = np.zeros((40, 30, 20), np.uint8)
    labels[26:36, 18:28, 10:18] = 1
    labels[4:14, 18:28, 10:18] = 2
    affine = np.diag([-2.0, 2.0, 5.0, 1.0])
    return Volume(np.full(labels.shape, 40, np.float32), affine), Volume(labels, affine)


def mean_column(picture, label):
    hit = (np.abs(picture.astype(int) - colour_of(label)) <= 2).all(axis=-1)
    return np.argwhere(hit).mean(axis=0)


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "PSR", "IRA"])
def test_radiological_display_whatever_the_orientation(orientation):
    image, labels = (reorient(volume, orientation) for volume in scan())
    picture = np.asarray(render(image, labels, NAMES, "ct", "case"))
    expected = np.asarray(render(*scan(), NAMES, "ct", "case"))
    np.testing.assert_array_equal(picture, expected)
    # Axis i of the scan runs to the left, so label 1, at its end, is on the patient's left: the viewer's right.
    axial = picture[56:, 12 : 12 + PREVIEW_PIXELS][:360]
    assert mean_column(axial, 1)[1] > PREVIEW_PIXELS / 2 > mean_column(axial, 2)[1]
    # The front is above.
    assert mean_column(axial, 1)[0] < 180


def test_millimetres_are_equally_long():
    picture = render(*scan(), NAMES, "ct")
    # 80 x 60 x 100 mm: the longest side has PREVIEW_PIXELS, the panels are 80 x 60, 80 x 100, 60 x 100 mm.
    scale = PREVIEW_PIXELS / 100
    assert picture.width == pytest.approx((80 + 80 + 60) * scale + 4 * 12, abs=2)


def test_show_draws_a_scan_its_labels_and_a_label_map_alone():
    image, labels = scan()
    plain = np.asarray(show(image))
    assert (np.ptp(plain.astype(int), axis=-1) < 10).all()  # greys alone
    for drawn in (show(image, labels, NAMES), show(labels, names=NAMES)):
        assert mean_column(np.asarray(drawn), 1)[1] != mean_column(np.asarray(drawn), 2)[1]
    np.testing.assert_array_equal(show(image, labels), show(image, reorient(labels, "PSR")))
    with Image.open(io.BytesIO(labels._repr_png_())) as picture:
        np.testing.assert_array_equal(picture, show(labels))


def test_show_says_what_is_wrong():
    image, labels = scan()
    with pytest.raises(DatasetError, match=r"volume is a ndarray; expected Volume\(array, affine\)"):
        show(image.array)
    with pytest.raises(DatasetError, match="labels is a list; expected Volume"):
        show(image, [labels])
    halves = Volume(image.array / 80, image.affine)
    with pytest.raises(DatasetError, match=r"values from 0\.5 to 0.5; expected whole numbers, 0 to 65535"):
        show(labels, halves)


@pytest.mark.parametrize("modality", ["ct", "mr", "us"])
def test_constant_and_empty_scans(modality):
    image = Volume(np.zeros((9, 8, 7, 2), np.float32), np.eye(4))
    picture = render(image, Volume(np.zeros((9, 8, 7), np.uint8), np.eye(4)), {}, modality)
    assert picture.mode == "RGB"


def test_many_structures_have_a_legend(tmp_path):
    labels = np.arange(1000, dtype=np.uint16).reshape(10, 10, 10) % 60
    picture = render(Volume(labels.astype(np.float32), np.eye(4)), Volume(labels, np.eye(4)), {1: "x" * 60}, "mr")
    assert picture.height > PREVIEW_PIXELS


def test_written_whole_or_not_at_all(tmp_path):
    write_preview(tmp_path / "previews" / "a.png", *scan(), NAMES, "ct", "a")
    with Image.open(tmp_path / "previews" / "a.png") as picture:
        assert picture.format == "PNG"
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_preview(tmp_path / "file" / "a.png", *scan(), NAMES, "ct")


def test_values_with_gaps_have_colours_of_their_own():
    hearts = (205, 420, 500, 550, 600, 820, 850)
    assert len({*colours_of(hearts).values()}) == len(hearts)
    assert colours_of({1, 3, 4}) == {value: colour_of(value) for value in (1, 3, 4)}
    assert colours_of(range(1, 41))[40] == colour_of(40) and colours_of(()) == {}


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
