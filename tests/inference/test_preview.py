import numpy as np
import pytest
from PIL import Image

from mambahome_jax.errors import OutputError
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.inference.preview import PANEL_PIXELS, colour_of, colours_of, label_counts, render, write_preview

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
    axial = picture[56:, 12 : 12 + PANEL_PIXELS][:360]
    assert mean_column(axial, 1)[1] > PANEL_PIXELS / 2 > mean_column(axial, 2)[1]
    # The front is above.
    assert mean_column(axial, 1)[0] < 180


def test_millimetres_are_equally_long():
    picture = render(*scan(), NAMES, "ct")
    # 80 x 60 x 100 mm: the longest side has PANEL_PIXELS, the panels are 80 x 60, 80 x 100, 60 x 100 mm.
    scale = PANEL_PIXELS / 100
    assert picture.width == pytest.approx((80 + 80 + 60) * scale + 4 * 12, abs=2)


@pytest.mark.parametrize("modality", ["ct", "mr", "us"])
def test_constant_and_empty_scans(modality):
    image = Volume(np.zeros((9, 8, 7, 2), np.float32), np.eye(4))
    picture = render(image, Volume(np.zeros((9, 8, 7), np.uint8), np.eye(4)), {}, modality)
    assert picture.mode == "RGB"


def test_many_structures_have_a_legend(tmp_path):
    labels = np.arange(1000, dtype=np.uint16).reshape(10, 10, 10) % 60
    picture = render(Volume(labels.astype(np.float32), np.eye(4)), Volume(labels, np.eye(4)), {1: "x" * 60}, "mr")
    assert picture.height > PANEL_PIXELS


def test_counts():
    labels = np.array([[[0, 2, 2]], [[300, 0, 2]]], np.uint16)
    assert label_counts(labels) == {2: 3, 300: 1}
    assert label_counts(np.zeros((2, 2, 2), np.uint8)) == {}


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
