"""Reading and writing NIfTI: equal to MONAI's loader, and every fault named."""

import contextlib
import gzip
import json
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.volume import Volume, read_grid, read_labels, read_volume, write_volume
from tests.conftest import golden_path, load_golden
from tests.imaging.dicom_files import write_slice

CASES = [
    "real_ras",
    "real_oblique",
    "psr_int16_scl",
    "qform_only_f32",
    "ail_uint8_4d",
    "shear_bigendian",
    "no_codes_uint8",
    "near_target",
]


@pytest.mark.parametrize("case", CASES)
def test_reads_as_monai(case):
    expected = load_golden(f"pipeline/geometry/{case}.npz")
    path = golden_path(f"pipeline/geometry/{case}_image.nii.gz")
    image, labels = read_volume(path), read_labels(golden_path(f"pipeline/geometry/{case}_label.nii.gz"))
    assert image.array.dtype == np.float32 and labels.array.dtype == np.uint8
    np.testing.assert_array_equal(image.array, expected["image"])
    np.testing.assert_array_equal(labels.array, expected["label"])
    np.testing.assert_array_equal(image.affine, expected["affine"])
    np.testing.assert_array_equal(labels.affine, expected["label_affine"])
    grid = read_grid(path)
    assert grid.array.shape == expected["image"].shape
    np.testing.assert_array_equal(grid.affine, expected["affine"])


def oblique() -> np.ndarray:
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([0.7, 1.3, 2.9]), [-30, 4, 9])
    return affine.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_written_volume_reads_back_exactly(tmp_path, suffix, dtype):
    array = np.random.default_rng(0).integers(0, 250, (5, 6, 7)).astype(dtype)
    path = tmp_path / f"scan{suffix}"
    write_volume(path, Volume(array, oblique()))
    content = path.read_bytes()
    write_volume(path, Volume(array, oblique()), dtype=array.dtype)
    assert path.read_bytes() == content
    stored = nib.load(path)
    assert stored.get_data_dtype() == dtype
    assert int(stored.header["sform_code"]) == 1 and int(stored.header["qform_code"]) == 1
    np.testing.assert_allclose(stored.header.get_qform(), oblique(), atol=1e-5)
    np.testing.assert_allclose(stored.header.get_zooms(), [0.7, 1.3, 2.9], rtol=1e-6)
    back = read_volume(path)
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_array_equal(back.affine, oblique())
    np.testing.assert_allclose(back.spacing, [0.7, 1.3, 2.9], rtol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3, st.integers(2, 3)),
    axes=st.permutations(range(3)),
    flips=st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
)
def test_any_memory_order_survives(tmp_path_factory, shape, axes, flips):
    path = tmp_path_factory.mktemp("order") / "scan.nii"
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    view = array.transpose(*axes, 3)[:: flips[0], :: flips[1], :: flips[2]]
    write_volume(path, Volume(view, np.eye(4)))
    back = read_volume(path, channels=shape[3])
    np.testing.assert_array_equal(back.array, view)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), view)


def test_same_volume_gives_same_bytes(tmp_path):
    volume = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_sheared_affine_stays_exact_and_leaves_the_qform_out(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.25
    write_volume(tmp_path / "a.nii.gz", Volume(np.ones((3, 4, 5), np.uint8), affine))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").affine, affine)
    assert int(nib.load(tmp_path / "a.nii.gz").header["qform_code"]) == 0


@pytest.mark.parametrize(
    ("stored", "expected"), [(np.float64, np.float32), (bool, np.uint8), (np.int64, np.int32), (np.float16, np.float32)]
)
def test_types_that_nifti_readers_dislike_are_converted(tmp_path, stored, expected):
    write_volume(tmp_path / "a.nii", Volume(np.ones((2, 3, 4), stored), np.eye(4)))
    assert nib.load(tmp_path / "a.nii").get_data_dtype() == expected


def save(path, array):
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def test_nifti2_and_a_plain_suffix_on_gzip_are_read(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nib.save(nib.Nifti2Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "b.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii").array, array)


@pytest.mark.parametrize(("dtype", "top", "expected"), [(np.float64, 13, np.uint8), (np.float32, 1000, np.uint16)])
def test_whole_numbers_stored_as_floats_are_labels(tmp_path, dtype, top, expected):
    array = np.array([0, 1, top - 1e-5, top], dtype).reshape(1, 2, 2)
    labels = read_labels(save(tmp_path / "a.nii.gz", array)).array
    assert labels.dtype == expected
    assert labels.ravel().tolist() == [0, 1, top, top]


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.5, "value 0.5"), (-1, "from -1"), (70000, "to 70000"), (np.nan, "NaN"), (np.inf, "infinite")],
)
def test_values_that_are_no_labels_are_refused(tmp_path, value, found):
    array = np.zeros((3, 3, 3))
    array[1, 1, 1] = value
    with pytest.raises(DatasetError, match=found) as caught:
        read_labels(save(tmp_path / "a.nii.gz", array))
    assert str(tmp_path / "a.nii.gz") in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_image_with_a_voxel_that_is_not_finite_is_refused(tmp_path, value):
    array = np.zeros((4, 4, 4))
    array[2, 1, 3] = value
    with pytest.raises(DatasetError, match="1 voxel is NaN or infinite"):
        read_volume(save(tmp_path / "a.nii.gz", array))


def damage(path, content):
    path.write_bytes(content)
    return path


def good_bytes(tmp_path, suffix=".nii.gz"):
    array = np.random.default_rng(0).integers(0, 1000, (12, 11, 10), dtype=np.int16)
    return save(tmp_path / f"good{suffix}", array).read_bytes()


def flattened(content):
    """The second row of the sform set to zero."""
    return content[:296] + bytes(16) + content[312:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.nii.gz", "no such file"),
        (lambda p: p, "cannot be read"),
        (lambda p: damage(p / "a.nii.gz", b""), "not a NIfTI file"),
        (lambda p: damage(p / "a.nii.gz", b"no scan at all" * 40), "not a NIfTI file"),
        (lambda p: damage(p / "a.nii.gz", gzip.compress(bytes(1000))), "not a NIfTI file"),
        (lambda p: damage(p / "a.nii.gz", good_bytes(p)[:-900]), "truncated or damaged"),
        (lambda p: damage(p / "a.nii.gz", good_bytes(p)[:-8] + bytes(8)), "truncated or damaged"),
        (lambda p: damage(p / "a.nii", good_bytes(p, ".nii")[:-1]), "truncated: 2639 bytes of voxels; expected 2640"),
        (lambda p: save(p / "a.nii.gz", np.zeros((4, 4), np.int16)), "2 axes"),
        (lambda p: save(p / "a.nii.gz", np.zeros((4, 4, 4, 2, 3), np.int16)), "5 axes"),
        (lambda p: save(p / "a.nii.gz", np.zeros((4, 0, 4), np.int16)), "empty volume"),
        (lambda p: save(p / "a.nii.gz", np.zeros((4, 4, 4), np.complex64)), "type complex64"),
        (lambda p: damage(p / "a.nii", flattened(good_bytes(p, ".nii"))), "singular affine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_are_named_with_what_was_found(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.dcm", r"a\.dcm: a DICOM file; .*name the folder of the slices"),
        ("a.img", r"a\.img: a DICOM file; .*name the folder of the slices"),
        ("a.mgz", "FreeSurfer's format, which is not read. Convert it"),
        ("b.img", "half of an Analyze or NIfTI pair"),
        ("a.txt", "not a scan by its name"),
    ],
)
def test_files_of_other_formats_say_what_they_are(tmp_path, name, message):
    write_slice(tmp_path / name, np.zeros((4, 5), np.int16))
    if name not in ("a.dcm", "a.img"):
        (tmp_path / name).write_bytes(b"something else" * 50)
    for read in (read_volume, read_labels, read_grid):
        with pytest.raises(DatasetError, match=message):
            read(tmp_path / name)


def test_channels_are_checked_where_the_caller_knows_them(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros((4, 5, 6, 2), np.int16))
    assert read_volume(path).array.shape == (4, 5, 6, 2)
    assert read_volume(path).shape == (4, 5, 6)
    with pytest.raises(DatasetError, match=r"4D volume \(4, 5, 6, 2\); expected a 3D volume"):
        read_volume(path, channels=1)
    with pytest.raises(DatasetError, match="expected 3 channels"):
        read_volume(path, channels=3)
    with pytest.raises(DatasetError, match="expected a 3D volume"):
        read_labels(path)


def test_scaling_happens_in_double_precision(tmp_path):
    raw = np.arange(-3000, 3000, 7, dtype=np.int16)[:850].reshape(10, 5, 17)
    slope, inter = np.float32(0.1), np.float32(-1000.3)
    image = nib.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(slope, inter)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope, inter], "<f4").tobytes()
    path = damage(tmp_path / "a.nii", bytes(content))
    expected = (raw * float(slope) + float(inter)).astype(np.float32)
    np.testing.assert_array_equal(read_volume(path).array, expected)


def test_folder_in_the_way_names_folder_and_reason(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    volume = Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    with pytest.raises(OutputError, match=r"taken: cannot write a\.nii\.gz: .*(exists|directory)"):
        write_volume(tmp_path / "taken" / "a.nii.gz", volume)
    assert (tmp_path / "taken").read_text() == "a file, not a folder"


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(np.ones((2, 2, 2), np.uint8), np.eye(4)))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mambahome_jax.imaging.nifti.parts_of", fail)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_volume(path, Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4)))
    assert str(tmp_path) in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]


def test_values_are_never_cut_to_fit_the_type(tmp_path):
    volume = Volume(np.array([0, 300]).reshape(1, 1, 2), np.eye(4))
    with pytest.raises(OutputError, match="values from 0 to 300"):
        write_volume(tmp_path / "a.nii.gz", volume, dtype=np.uint8)
    with pytest.raises(OutputError, match=r"expected \.nii\.gz, \.nii, \.mha or \.nrrd"):
        write_volume(tmp_path / "a.png", volume)
    assert not list(tmp_path.iterdir())


def test_volume_refuses_what_is_no_volume():
    with pytest.raises(DatasetError, match="expected 3 or 4 axes"):
        Volume(np.zeros((2, 2)), np.eye(4))
    with pytest.raises(DatasetError, match="expected 3 or 4 axes"):
        Volume(np.zeros((2, 2, 2)), np.eye(3))
    with pytest.raises(DatasetError, match="array is a list; expected an array of NumPy"):
        Volume([[[1]]], np.eye(4))


def test_a_volume_is_one_line():
    array = np.zeros((4, 3, 2), np.int16)
    array[0, 0, 0], array[1, 0, 0] = -1024, 1903
    text = "Volume 4 x 3 x 2 int16, 0.8 x 0.8 x 3 mm, LPS, -1024..1903"
    assert repr(Volume(array, np.diag([-0.8, -0.8, 3, 1]))) == text
    assert (
        repr(Volume(np.zeros((0, 1, 1, 2), np.float32), np.eye(4))) == "Volume 0 x 1 x 1 x 2 float32, 1 x 1 x 1 mm, RAS"
    )
    assert repr(Volume(array[:1], np.diag([0.0, 1, 1, 1]))).startswith("Volume 1 x 3 x 2 int16, 0 x 1 x 1 mm, ")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_names_of_labels_lie_in_the_header(tmp_path, suffix):
    names = {1: "liver", 12: "Milz \u00e4"}
    label = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / f"label{suffix}"
    write_volume(path, Volume(label, np.eye(4)), names=names)
    (extension,) = nib.load(path).header.extensions
    assert extension.get_code() == 6
    text = bytes(extension.get_content()).rstrip(b"\0")
    assert json.loads(text) == {"labels": {"1": "liver", "12": "Milz \u00e4"}}
    np.testing.assert_array_equal(nib.load(path).get_fdata(), label)
    np.testing.assert_array_equal(read_labels(path).array, label)


@pytest.mark.parametrize("code", [0, 1])
def test_an_sform_of_zeros_gives_way_to_the_qform(tmp_path, code):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    path = tmp_path / "scan.nii"
    write_volume(path, Volume(np.zeros((2, 3, 4), np.float32), affine))
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)
    content[254:256] = code.to_bytes(2, "little")
    path.write_bytes(content)
    np.testing.assert_allclose(read_volume(path).affine, affine)


@pytest.mark.parametrize(
    ("dtype", "slope", "expected"),
    [
        (np.int16, 1, np.int16),
        (np.uint8, 1, np.uint8),
        (np.float32, 1, np.float32),
        (np.float64, 1, np.float32),
        (np.int16, 2, np.float32),
    ],
)
def test_as_stored_has_the_values_without_a_copy(tmp_path, dtype, slope, expected):
    array = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), dtype=dtype)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "a.nii")
    found = read_volume(tmp_path / "a.nii", as_stored=True)
    assert found.array.dtype == expected
    np.testing.assert_array_equal(found.array, read_volume(tmp_path / "a.nii").array)


def test_as_stored_refuses_nan_as_well(tmp_path):
    write_volume(tmp_path / "a.nii", Volume(np.full((2, 2, 2), np.nan, np.float32), np.eye(4)))
    with pytest.raises(DatasetError, match="8 voxels are NaN"):
        read_volume(tmp_path / "a.nii", as_stored=True)


@pytest.mark.parametrize(("offset", "form", "value"), [(108, "<f", 353.0), (252, "<h", 77), (80, "<f", np.inf)])
def test_a_header_that_nibabel_mends_or_doubts_is_read_without_a_word_of_its_own(tmp_path, caplog, offset, form, value):
    path = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    content = bytearray(path.read_bytes() + b"\0" * 16)
    struct.pack_into("<2h", content, 252, 1, 0)
    struct.pack_into(form, content, offset, value)
    path.write_bytes(content)
    with contextlib.suppress(DatasetError):
        read_volume(path)
    assert not caplog.records
