"""What is written beside a scan lies on it, read by nibabel and by SimpleITK, whatever the scan's header says."""

import itertools
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.geometry import on_grid_of, reorient, resample, shift_between
from mambahome_jax.imaging.header import itk_form, mm_per_unit
from mambahome_jax.imaging.volume import Volume, read_grid, read_labels, read_volume, write_volume
from tests.imaging.nifti_headers import MOVED, OBLIQUE, SHAPE, STRAIGHT, apart, crop, in_itk, save, sheared

SFORMS = {"straight": STRAIGHT, "oblique": OBLIQUE, "micrometres": sheared(0.015), "sheared": sheared(0.4)}
QFORMS = {"straight": STRAIGHT, "moved": MOVED, "oblique": OBLIQUE}
FORMATS = ("nii.gz", "nii", "mha", "nrrd")
HEADERS = [
    *itertools.product(SFORMS, (0, 1, 2, 4), QFORMS, (0, 1, 2), (2,)),
    *itertools.product(("straight", "micrometres"), (0, 1, 4), ("straight", "moved"), (0, 1), (0, 1, 3)),
]


def test_a_result_lies_on_its_scan_in_every_program(tmp_path):
    for number, (sform, scode, qform, qcode, unit) in enumerate(HEADERS):
        case = f"{sform} {scode}, {qform} {qcode}, unit {unit}"
        path = save(tmp_path / "scan.nii", SFORMS[sform], scode, QFORMS[qform], qcode, unit)
        scan, seen = read_volume(path), in_itk(path)
        result = Volume((scan.array > 9).astype(np.uint8), scan.affine, scan.header)
        for ending in FORMATS if number % 7 == 0 else ("nii", FORMATS[2 + number % 2]):
            written = tmp_path / f"result.{ending}"
            note = write_volume(written, result, warn=False)
            found = in_itk(written)
            if seen is None and ending.startswith("nii"):
                assert ".nrrd" in note, case
            else:
                assert note is None, case
                assert apart(scan.affine if seen is None else seen, found) < 0.01, f"{case}: {ending}"
            if not ending.startswith("nii"):
                continue
            one, other = nib.load(path), nib.load(written)
            assert apart(one.affine, other.affine) < 0.01, f"{case}: {ending}"
            for name in ("sform_code", "qform_code", "xyzt_units"):
                assert one.header[name] == other.header[name], case
            np.testing.assert_array_equal(read_labels(written).array, result.array)


def test_where_itk_sees_a_file_is_known_without_it(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(150):
        scode, qcode = int(rng.choice([0, 1, 2, 4])), int(rng.choice([0, 1, 2]))
        turned = nib.eulerangles.euler2mat(*rng.uniform(-3, 3, 3)) @ np.diag([1.5, 1.5, 2])
        shear = np.eye(3) + np.triu(rng.normal(size=(3, 3)), 1) * rng.choice([0, 1e-5, 1e-2])
        sform = nib.affines.from_matvec(turned @ shear, rng.normal(size=3) * rng.choice([0, 100, 1000]))
        unit = int(rng.choice([0, 1, 2, 3]))
        path = save(tmp_path / "scan.nii", sform, scode, list(QFORMS.values())[rng.integers(3)], qcode, unit)
        header, seen = nib.load(path).header, in_itk(path)
        known = itk_form(header)
        assert (known is None) == (seen is None)
        if seen is not None:
            known[:3] *= mm_per_unit(header)
            assert apart(seen, known) < 0.005


@pytest.mark.parametrize("change", ["LPS", "PIR", "crop", "resample"])
def test_what_is_made_of_a_scan_on_other_voxels_lies_on_it_too(tmp_path, change):
    changes = {"crop": lambda v: crop(v, (2, 1, -1), (7, 6, 5)), "resample": lambda v: resample(v, (3.0, 1.0, 2.5))}
    # Every fifth, so that each change meets every value of each part of a header.
    for sform, scode, qform, qcode, unit in HEADERS[::5]:
        case = f"{sform} {scode}, {qform} {qcode}, unit {unit}"
        path = save(tmp_path / "scan.nii", SFORMS[sform], scode, QFORMS[qform], qcode, unit)
        scan, seen = read_volume(path), in_itk(path)
        made = changes[change](scan) if change in changes else reorient(scan, change)
        moved = np.linalg.inv(scan.affine) @ made.affine
        for ending in ("nii", "nrrd"):
            note = write_volume(tmp_path / f"made.{ending}", made, warn=False)
            found = in_itk(tmp_path / f"made.{ending}")
            if ending == "nii":
                assert apart(nib.load(path).affine @ moved, nib.load(tmp_path / "made.nii").affine) < 0.01, case
            if seen is not None and note is None:
                assert apart(seen @ moved, found, made.shape) < 0.01, f"{case}: {ending}"
            assert note is None or (ending == "nii" and ".nrrd" in note and "sheared micrometres".find(sform) >= 0), (
                case
            )


@pytest.mark.parametrize("ending", ["mha", "nrrd"])
@pytest.mark.parametrize("shear", [0, 1e-5, 2e-3, 0.4])
def test_a_scan_of_one_grid_has_it_in_both_forms_or_a_note(tmp_path, ending, shear):
    image = sitk.GetImageFromArray(np.zeros(SHAPE[::-1], np.int16))
    image.SetSpacing((1.5, 1.5, 2))
    image.SetDirection((1, shear, 0, 0, 1, 0, 0, 0, 1))
    image.SetOrigin((3, -4, 500))
    sitk.WriteImage(image, str(tmp_path / f"scan.{ending}"))
    scan, seen = read_volume(tmp_path / f"scan.{ending}"), in_itk(tmp_path / f"scan.{ending}")
    note = write_volume(tmp_path / "result.nii.gz", scan, warn=False)
    assert apart(scan.affine, nib.load(tmp_path / "result.nii.gz").affine) < 0.01
    found = in_itk(tmp_path / "result.nii.gz")
    assert (note is not None) == (found is None or apart(seen, found) > 0.01) == (shear > 0.01)
    assert note is None or (".nrrd" in note and ".mha" in note)
    for other in ("mha", "nrrd"):
        assert write_volume(tmp_path / f"result.{other}", scan, warn=False) is None
        assert apart(seen, in_itk(tmp_path / f"result.{other}")) < 0.01


def test_a_place_that_nifti_cannot_say_is_warned_of_beside_a_scan(tmp_path):
    scan = read_volume(save(tmp_path / "scan.nii", sheared(0.4), 1, STRAIGHT, 0))
    with pytest.warns(UserWarning, match=r"result.nii.gz: ITK programs .* refuse it.*\.nrrd or \.mha"):
        write_volume(tmp_path / "result.nii.gz", scan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_volume(tmp_path / "result.nrrd", scan)


def test_lengths_that_contradict_the_sform_are_not_said_to_be_shear(tmp_path):
    def edit(header):
        header["pixdim"][1:4] = 1

    scan = read_volume(save(tmp_path / "scan.nii", STRAIGHT, 1, STRAIGHT, 0, edit=edit))
    assert write_volume(tmp_path / "result.nii.gz", scan, warn=False) is None
    note = write_volume(tmp_path / "turned.nii.gz", reorient(scan, "PIR"), warn=False)
    assert "cannot say its place to them and to others alike; .nrrd" in note and "right angles" not in note


def test_headers_that_nibabel_mends_are_handed_on_as_they_are_stored(tmp_path):
    def edit(header):
        header["pixdim"][0], header["pixdim"][1], header["descrip"] = -0.5, -1.5, b"Doe, Jane"

    path = save(tmp_path / "scan.nii", STRAIGHT, 2, MOVED, 1, edit=edit)
    write_volume(tmp_path / "result.nii", read_volume(path))
    stored = (nib.Nifti1Header(file.read_bytes()[:348], check=False) for file in (path, tmp_path / "result.nii"))
    scan, result = stored
    np.testing.assert_array_equal(scan["pixdim"][:4], result["pixdim"][:4])
    np.testing.assert_allclose(in_itk(path), in_itk(tmp_path / "result.nii"))
    assert b"Doe" not in (tmp_path / "result.nii").read_bytes()


def test_more_voxels_along_an_axis_than_nifti_1_can_say_make_nifti_2(tmp_path):
    volume = Volume(np.arange(40000, dtype=np.int32).reshape(40000, 1, 1), np.diag([0.1, 1, 1, 1]))
    with pytest.warns(UserWarning, match=r"long.nii.gz: ITK programs .* do not read NIfTI-2.*\.nrrd or \.mha"):
        write_volume(tmp_path / "long.nii.gz", volume, names={1: "one"})
    assert in_itk(tmp_path / "long.nii.gz") is None
    assert write_volume(tmp_path / "long.nrrd", volume) is None
    assert apart(in_itk(tmp_path / "long.nrrd"), volume.affine, volume.shape) < 0.01
    image = nib.load(tmp_path / "long.nii.gz")
    assert isinstance(image, nib.Nifti2Image) and image.shape == (40000, 1, 1)
    np.testing.assert_array_equal(read_volume(tmp_path / "long.nii.gz").array, volume.array)


@pytest.mark.parametrize("qcode", [0, 1])
@pytest.mark.parametrize("scode", [0, 1, 2, 4])
def test_a_label_map_drawn_in_an_itk_program_fits_its_scan(tmp_path, scode, qcode):
    scan = save(tmp_path / "scan.nii", STRAIGHT, scode, MOVED, qcode)
    image = sitk.ReadImage(str(scan))
    drawn = sitk.Cast(image > 9, sitk.sitkUInt8)
    drawn.CopyInformation(image)
    for ending in FORMATS:
        sitk.WriteImage(drawn, str(tmp_path / f"label.{ending}"))
        label = read_labels(tmp_path / f"label.{ending}")
        on_grid_of(read_volume(scan), label, tmp_path / f"label.{ending}")
        assert shift_between(label, read_volume(scan))[0] < 1e-4


def test_a_label_map_elsewhere_is_refused_though_a_form_that_means_nothing_agrees(tmp_path):
    scan = read_volume(save(tmp_path / "scan.nii", STRAIGHT, 1, MOVED, 1))
    label = read_labels(save(tmp_path / "label.nii", OBLIQUE, 1, MOVED, 1))
    with pytest.raises(DatasetError, match="off the image's"):
        on_grid_of(scan, label, tmp_path / "label.nii")


@pytest.mark.parametrize("unit", [0, 1, 2, 3, 10, 11])
def test_lengths_are_in_mm_as_itk_reads_them(tmp_path, unit):
    path = save(tmp_path / "scan.nii", STRAIGHT, 1, STRAIGHT, 1, unit & 7 or unit, edit=None)
    content = bytearray(path.read_bytes())
    content[123] = unit
    path.write_bytes(content)
    np.testing.assert_allclose(read_volume(path).affine, in_itk(path), rtol=1e-5)
    np.testing.assert_allclose(read_grid(path).affine, in_itk(path), rtol=1e-5)
    np.testing.assert_allclose(read_labels(path).spacing, sitk.ReadImage(str(path)).GetSpacing(), rtol=1e-5)


def tiny(folder: Path, ending: str, factor: float) -> Path:
    image = sitk.GetImageFromArray(np.arange(20 * 18 * 16, dtype=np.int16).reshape(16, 18, 20))
    image.SetSpacing((1.5 * factor, 1.5 * factor, 2 * factor))
    sitk.WriteImage(image, str(folder / f"scan.{ending}"))
    return folder / f"scan.{ending}"


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("factor", "advice"), [(0.001, 1000), (0.1, 1000), (1000, 0.001)])
def test_a_scan_of_no_size_is_refused_by_name_unless_it_is_confirmed(tmp_path, ending, factor, advice):
    path = tiny(tmp_path, ending, factor)
    for read in (read_volume, read_labels, read_grid):
        with pytest.raises(DatasetError, match=rf"scan\.{ending}: .*5 mm to 5 m.*--spacing_scale {advice} "):
            read(path)
        read(path, spacing_scale=1)
        read(path, spacing_scale=1 / factor)
    with pytest.raises(ConfigError, match="spacing_scale"):
        read_volume(path, spacing_scale=0)
    mended = read_volume(path, spacing_scale=1 / factor)
    np.testing.assert_allclose(mended.spacing, [1.5, 1.5, 2], rtol=1e-5)
    for other in FORMATS:
        written = tmp_path / f"result.{other}"
        write_volume(written, mended)
        assert apart(in_itk(path), in_itk(written)) < 0.01
        np.testing.assert_allclose(read_volume(written, spacing_scale=1 / factor).spacing, [1.5, 1.5, 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((3, 4, 2), (1, 1, 1)), ((10, 10, 10), (0.4, 0.4, 0.4)), ((512, 512, 1), (0.02, 0.02, 900))]
)
def test_few_voxels_of_an_ordinary_size_are_no_wrong_header(tmp_path, shape, spacing):
    write_volume(tmp_path / "part.nii", Volume(np.zeros(shape, np.uint8), np.diag([*spacing, 1])))
    assert read_volume(tmp_path / "part.nii").shape == shape


def test_a_thin_slice_counts_by_what_it_shows(tmp_path):
    write_volume(tmp_path / "a.nii", Volume(np.zeros((512, 512, 1), np.uint8), np.diag([5e-4, 5e-4, 5, 1])))
    with pytest.raises(DatasetError, match="--spacing_scale 1000"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_vectors_are_channels_in_every_format_and_stay_vectors(tmp_path, channels):
    truth = np.random.default_rng(0).normal(size=(*SHAPE, channels)).astype(np.float32)
    image = sitk.GetImageFromArray(truth.transpose(2, 1, 0, 3), isVector=True)
    for ending in FORMATS:
        sitk.WriteImage(image, str(tmp_path / f"scan.{ending}"))
        scan = read_volume(tmp_path / f"scan.{ending}", channels=channels)
        np.testing.assert_array_equal(scan.array, truth)
        assert read_grid(tmp_path / f"scan.{ending}").array.shape == truth.shape
    write_volume(tmp_path / "again.nii", read_volume(tmp_path / "scan.nii"))
    again = sitk.ReadImage(str(tmp_path / "again.nii"))
    assert again.GetNumberOfComponentsPerPixel() == channels
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(image))


def test_one_time_point_of_one_value_is_a_volume(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(*SHAPE, 1, 1)
    path = save(tmp_path / "scan.nii", STRAIGHT, 1, STRAIGHT, 1, array=array)
    np.testing.assert_array_equal(read_volume(path, channels=1).array, array[..., 0, 0])
    several = np.zeros((*SHAPE, 2, 3), np.int16)
    with pytest.raises(DatasetError, match="5 axes"):
        read_volume(save(tmp_path / "series.nii", STRAIGHT, 1, STRAIGHT, 1, array=several))


@pytest.mark.parametrize("kind", [nib.Nifti2Image, nib.Nifti1Image])
def test_headers_of_either_version_and_byte_order_are_handed_on(tmp_path, kind):
    image = kind(np.zeros(SHAPE, np.int16), STRAIGHT, kind.header_class(endianness=">"))
    image.set_sform(STRAIGHT, 4)
    image.set_qform(MOVED, 2)
    nib.save(image, tmp_path / "scan.nii.gz")
    write_volume(tmp_path / "result.nii.gz", read_volume(tmp_path / "scan.nii.gz"))
    scan, result = (nib.load(tmp_path / f"{name}.nii.gz").header for name in ("scan", "result"))
    for form in ("get_sform", "get_qform"):
        for one, other in zip(getattr(scan, form)(coded=True), getattr(result, form)(coded=True), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_damaged_forms_are_answered_without_a_traceback_or_warning(tmp_path):
    good = read_volume(save(tmp_path / "good.nii", STRAIGHT, 1, MOVED, 1))
    content, rng = (tmp_path / "good.nii").read_bytes(), np.random.default_rng(0)
    numbers = np.array([np.nan, np.inf, -np.inf, 0, -1.5, 1e30, 1e-30, 5], "<f4")
    read = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            at = int(rng.choice([*range(76, 92, 4), *range(256, 328, 4)]))
            damaged[at : at + 4] = rng.choice(numbers).tobytes()
            damaged[at := int(rng.integers(252, 328))] = rng.integers(256)
        (tmp_path / "bad.nii").write_bytes(damaged)
        try:
            scan = read_volume(tmp_path / "bad.nii", spacing_scale=1)
        except DatasetError:
            continue
        read += 1
        assert min(shift_between(good, scan)) >= 0 and min(shift_between(scan, good)) >= 0
        for volume in (scan, reorient(scan, "PIR"), crop(scan, (1, 1, 1), (4, 4, 4))):
            write_volume(tmp_path / "made.nii", volume, warn=False)
        write_volume(tmp_path / "made.nrrd", scan)
    assert read > 20
