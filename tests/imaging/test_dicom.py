"""DICOM slices become one volume on the grid that their positions say."""

import locale
import struct

import numpy as np
import pytest

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom import holds_slices
from mambahome_jax.imaging.volume import read_volume
from tests.imaging.dicom_files import MR, PATIENT, RTSTRUCT, write_slice

SHAPE = (5, 4, 6)  # columns, rows, slices
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
STRAIGHT = np.eye(3)
TURNED = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


def series(folder, directions=STRAIGHT, spacing=(0.7, 0.9, 2.5), origin=(-10.0, 20, 30), shift=None, **options):
    """Slices of VOXELS; directions, origin and shift of each slice (slices, 3) in LPS; names not in order of place."""
    normal = np.cross(directions[:, 0], directions[:, 1])
    for k in range(SHAPE[2]):
        position = np.array(origin) + k * spacing[2] * normal + (0 if shift is None else shift[k])
        write_slice(
            folder / f"IM{k * 7 % 11:02}",
            VOXELS[:, :, k].T,
            position,
            directions[:, :2].T.ravel(),
            (spacing[1], spacing[0]),
            number=k * 5 % 6,
            **options,
        )
    return folder


@pytest.mark.parametrize("directions", [STRAIGHT, np.diag([-1.0, 1, -1]), np.eye(3)[:, [1, 2, 0]], TURNED])
def test_slices_are_put_where_their_positions_say(tmp_path, directions):
    volume = read_volume(series(tmp_path, directions))
    np.testing.assert_array_equal(volume.array, VOXELS)
    assert volume.array.dtype == np.float32
    axes = np.column_stack([directions[:, :2], np.cross(directions[:, 0], directions[:, 1])])
    lps = np.column_stack([axes * [0.7, 0.9, 2.5], [-10, 20, 30]])
    np.testing.assert_allclose(volume.affine[:3], np.diag([-1, -1, 1]) @ lps, atol=1e-8)


def test_the_series_reader_of_itk_has_the_same_grid(tmp_path):
    import SimpleITK as sitk

    volume = read_volume(series(tmp_path, TURNED))
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = sitk.ReadImage(files)
    sitk.WriteImage(image, str(tmp_path / "same.nii"))
    same = read_volume(tmp_path / "same.nii")
    np.testing.assert_array_equal(volume.array, same.array)
    np.testing.assert_allclose(volume.affine, same.affine, atol=2e-5)


@pytest.mark.parametrize("sop_class", ["1.2.840.10008.5.1.4.1.1.2", MR])
def test_each_slice_has_its_own_rescaling(tmp_path, sop_class):
    expected = []
    for k, (slope, inter) in enumerate([("1", "-1024"), ("0.5", "0.25"), ("2", "0")]):
        options = {"rescale": (slope, inter), "number": k, "sop_class": sop_class}
        write_slice(tmp_path / f"{k}.dcm", VOXELS[:, :, k].T, (0, 0, k), **options)
        expected.append(VOXELS[:, :, k] * np.float64(slope) + np.float64(inter))
    np.testing.assert_array_equal(read_volume(tmp_path).array, np.stack(expected, 2).astype(np.float32))


@pytest.mark.parametrize("rescale", [("1", "-1024"), ("0.5", "0.25"), None])
@pytest.mark.parametrize(("stored", "signed"), [(16, True), (16, False), (12, False), (10, False)])
def test_values_are_those_stored_whichever_way_a_screen_shows_them(tmp_path, stored, signed, rescale):
    pixels = np.random.default_rng(2).integers(-900 if signed else 0, 1000, (4, 5)).astype(np.int16)
    slope, inter = map(float, rescale or (1, 0))
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        options = {"photometric": photometric, "stored": stored, "signed": signed, "rescale": rescale}
        write_slice(tmp_path / photometric / "a.dcm", pixels, **options)
        values = read_volume(tmp_path / photometric).array[:, :, 0]
        np.testing.assert_array_equal(values, (pixels.T * slope + inter).astype(np.float32))


def test_monochrome1_that_cannot_be_read_is_named(tmp_path):
    write_slice(tmp_path / "a.dcm", np.arange(20, dtype=np.int16).reshape(4, 5), photometric="MONOCHROME1", stored=12)
    with pytest.raises(DatasetError, match=r"a\.dcm: MONOCHROME1 in a form that cannot be read.*dcm2niix"):
        read_volume(tmp_path)


def test_monochrome1_of_four_bytes_a_pixel_is_refused(tmp_path):
    path = write_slice(tmp_path / "a.dcm", np.arange(40, dtype=np.int16).reshape(4, 10), photometric="MONOCHROME1")
    content = path.read_bytes()
    for number, before, after in (("\x11\0", 10, 5), ("\0\1", 16, 32), ("\1\1", 16, 32), ("\2\1", 15, 31)):
        head = b"\x28\0" + number.encode("latin") + b"US\2\0"
        assert head + bytes([before, 0]) in content
        content = content.replace(head + bytes([before, 0]), head + bytes([after, 0]))
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.dcm: MONOCHROME1 in a form that cannot be read \(32 bits a pixel\)"):
        read_volume(tmp_path)
    path.write_bytes(content.replace(b"MONOCHROME1 ", b"MONOCHROME2 "))
    assert read_volume(tmp_path).array.shape == (5, 4, 1)


def test_a_table_of_real_values_is_not_left_out(tmp_path):
    path = write_slice(tmp_path / "a.dcm", VOXELS[:, :, 0].T)
    content = path.read_bytes()
    place = content.rindex(struct.pack("<HH", 0x7FE0, 0x10))
    for item in (b"", struct.pack("<HHI", 0xFFFE, 0xE000, 0)):
        sequence = struct.pack("<HH2sHI", 0x28, 0x3000, b"SQ", 0, len(item)) + item
        path.write_bytes(content[:place] + sequence + content[place:])
        if not item:
            assert read_volume(tmp_path).shape == (5, 4, 1)
    with pytest.raises(DatasetError, match=r"a\.dcm: a table of real values .*dcm2niix"):
        read_volume(tmp_path)


@pytest.mark.parametrize("photometric", ["RGB", "PALETTE COLOR"])
def test_colours_are_refused_by_name(tmp_path, photometric):
    pixels = np.zeros((4, 5), np.int16)
    write_slice(tmp_path / "a.dcm", pixels, photometric=photometric)
    with pytest.raises(DatasetError, match=r"a\.dcm: "):
        read_volume(tmp_path)


def compressed(path):
    import SimpleITK as sitk

    image = sitk.ReadImage(str(write_slice(path, np.tile(VOXELS[:, :, 0].T, (9, 9)), (1, 2, 3))))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetCompressor("JPEG2000")
    writer.UseCompressionOn()
    writer.SetFileName(str(path))
    before = locale.setlocale(locale.LC_ALL)
    writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)  # the compressor leaves "C", in which later tests could read no UTF-8
    return path


def test_compressed_slices(tmp_path):
    path = compressed(tmp_path / "a.dcm")
    assert b"1.2.840.10008.1.2.4.9" in path.read_bytes()  # JPEG 2000
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[:, :, 0], np.tile(VOXELS[:, :, 0], (9, 9)))
    assert volume.affine[:3, 3].tolist() == [-1, -2, 3]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DatasetError, match=r"a\.dcm: truncated or damaged"):
        read_volume(tmp_path)


def test_a_tilted_gantry_is_a_sheared_grid(tmp_path):
    tilt = np.outer(np.arange(6), [0, 0.4, 0])
    affine = read_volume(series(tmp_path, shift=tilt)).affine
    np.testing.assert_allclose(affine[:3, 2], [0, -0.4, 2.5], atol=1e-9)


def test_what_lies_beside_the_slices_is_passed_over(tmp_path):
    series(tmp_path)
    write_slice(tmp_path / "RS.dcm", VOXELS[:, :, 0], sop_class=RTSTRUCT, series="1.2.9")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "._IM00").write_bytes(b"macOS")
    assert read_volume(tmp_path).shape == SHAPE
    assert holds_slices(tmp_path)


def test_rounded_positions_are_even_enough(tmp_path):
    shift = np.zeros((6, 3))
    shift[:, 2] = [0, 0.05, -0.05, 0.05, -0.05, 0]
    np.testing.assert_allclose(read_volume(series(tmp_path, shift=shift)).spacing, [0.7, 0.9, 2.5])


def test_one_slice_is_as_thick_as_it_says(tmp_path):
    write_slice(tmp_path / "a.dcm", VOXELS[:, :, 0].T, thickness="2.5")
    assert read_volume(tmp_path).spacing.tolist() == [1, 1, 2.5]


def lacking(folder):
    (series(folder) / "IM03").unlink()  # the third of four: k = 2 -> 14 % 11
    return r"missing or uneven slices: 5 mm between IM07 and IM10; expected 2\.5 mm, as between most of the 5"


def uneven(folder):
    series(folder, shift=np.outer([0, 0, 0, 1, 1, 1], [0, 0, 0.9]))
    return r"3\.4 mm between IM03 and IM10"


def twice(folder):
    write_slice(series(folder) / "again", VOXELS[:, :, 0].T, (-10, 20, 30), spacing=(0.9, 0.7))
    return "two slices at one place: IM00 and again"


def two_series(folder):
    series(folder)
    write_slice(folder / "scout", VOXELS[:, :, 0], series="1.2.5", sop_class=MR)
    return r"2 series:\n.*6 slices of 5 x 4 \(CT\), first IM00\n.*1 slice of 4 x 5 \(MR\), first scout"


def another_size(folder):
    write_slice(series(folder) / "scout", VOXELS[:, :, 0])
    return "scout: 4 x 5 pixels; expected 5 x 4 pixels"


def another_direction(folder):
    write_slice(series(folder) / "scout", VOXELS[:, :, 0].T, orientation=(0, 1, 0, 0, 0, -1), spacing=(0.9, 0.7))
    return "scout: another direction or pixel spacing"


def a_scout_that_comes_first(folder):
    write_slice(series(folder) / "AA", VOXELS[:, :, 0].T, orientation=(0, 1, 0, 0, 0, -1), spacing=(0.9, 0.7))
    return r"AA: another direction .*expected that of IM.*than the other 6\?"


def scouts_of_two_kinds(folder):
    for name in ("AA", "AB"):
        write_slice(folder / name, VOXELS[:, :, 0].T, orientation=(0, 1, 0, 0, 0, -1), spacing=(0.9, 0.7))
    write_slice(series(folder) / "ZZ", VOXELS[:, :, 0])
    return r"3 slices are unlike the other 6: AA \(another .*\), AB \(another .*\), ZZ \(4 x 5 pixels\); expected 5 x 4"


def another_spacing_first(folder):
    write_slice(series(folder) / "AA", VOXELS[:, :, 0].T, (-10, 20, 27.5), spacing=(0.8, 0.8))
    return r"AA: another direction or pixel spacing"


def beside_the_stack(folder):
    write_slice(series(folder) / "AA", VOXELS[:, :, 0].T, (-10, 60, 27.5), spacing=(0.9, 0.7))
    return r"slices shifted by up to 40 mm within their plane: AA; expected the place of the other 6"


def truncated(folder):
    file = series(folder) / "IM10"
    file.write_bytes(file.read_bytes()[:-20])
    return "IM10: truncated or damaged"


def many_frames(folder):
    write_slice(folder / "a.dcm", np.stack([VOXELS[:, :, 0]] * 3), frames=3)
    return "several slices in one file.*dcm2niix"


def mosaic(folder):
    write_slice(folder / "a.dcm", VOXELS[:, :, 0], image_type="ORIGINAL\\PRIMARY\\M\\MOSAIC")
    return "several slices in one file"


def without_place(folder):
    write_slice(folder / "a.dcm", VOXELS[:, :, 0], position=())
    return "no usable ImagePositionPatient; expected 3 numbers"


def no_dicom(folder):
    (folder / "a.dcm").write_text("text")
    return "a.dcm: truncated or damaged"


def nothing(folder):
    (folder / "notes.txt").write_text("notes")
    return "cannot be read: a folder without DICOM slices"


@pytest.mark.parametrize(
    "make",
    [
        *(lacking, uneven, twice, two_series, another_size, another_direction, truncated),
        *(a_scout_that_comes_first, scouts_of_two_kinds, another_spacing_first, beside_the_stack),
        *(many_frames, mosaic, without_place, no_dicom, nothing),
    ],
)
def test_folders_that_are_no_volume_are_refused_by_name(tmp_path, make):
    message = make(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        read_volume(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert PATIENT not in str(caught.value)


def test_an_element_or_a_size_that_claims_more_than_the_file_holds(tmp_path):
    path = write_slice(tmp_path / "scan" / "0.dcm", np.zeros((8, 10), np.int16))
    whole = path.read_bytes()
    pixels = whole.rindex(struct.pack("<HH", 0x7FE0, 0x10))
    path.write_bytes(whole[: pixels + 8] + struct.pack("<I", 1 << 31) + whole[pixels + 12 :])
    with pytest.raises(DatasetError, match=r"0.dcm: truncated or damaged; expected a whole"):
        read_volume(path.parent)
    rows = whole.rindex(struct.pack("<HH", 0x28, 0x10) + b"US")
    path.write_bytes(whole[: rows + 8] + b"\xff\xff" + whole[rows + 10 :])
    with pytest.raises(DatasetError, match=r"0.dcm: truncated or damaged \(10 x 65535 pixels in \d+ bytes\)"):
        read_volume(path.parent)
