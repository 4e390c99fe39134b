"""DICOM SEG of a label map: the same voxels in the series' grid, read back by pydicom alone as well as by ours."""

import sys

import numpy as np
import pydicom
import pytest

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import dicomseg
from mambahome_jax.imaging.volume import Volume, read_volume
from tests.imaging.dicom_files import PATIENT, write_slice

SHAPE = (11, 7, 6)  # columns, rows, slices: a frame's bits end within a byte
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
NORMAL = np.cross(OBLIQUE[:3], OBLIQUE[3:])
NAMES = {1: "liver", 2: "kidney_left", 3: "pancreas tumor"}


def series(folder, step=2.5 * NORMAL):
    """Slices written against their order; the volume as it is read."""
    for k in range(SHAPE[2]):
        pixels = np.full((SHAPE[1], SHAPE[0]), k, np.int16)
        position = np.array([-40.5, 12.25, 7]) + k * np.asarray(step)
        write_slice(folder / f"IM{9 - k}", pixels, position, OBLIQUE, (0.7, 1.1), number=k)
    return read_volume(folder)


def labels_on(volume, values=(1, 2), dtype=np.uint8):
    array = np.zeros(volume.shape, dtype, order="F")
    array[2:7, 1:5, 1:4] = values[0]
    array[6:10, 3:6, 3:6] = values[1]
    return Volume(array, volume.affine)


def by_position(path, volume):
    """Segment numbers in the grid of the volume, put there by the positions that the frames state."""
    found = pydicom.dcmread(path)
    frames = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    result = np.zeros(volume.shape, np.uint16)
    lps_to_voxel = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ volume.affine)
    shared = found.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)[::-1]
    for frame, groups in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        # In the SEG's own geometry; one segment alone has its number among the shared groups.
        number = groups.get("SegmentIdentificationSequence", shared.get("SegmentIdentificationSequence"))
        for row, column in np.argwhere(frame):
            place = corner + cosines[0] * between[0] * column + cosines[1] * between[1] * row
            voxel = lps_to_voxel @ np.array([*place, 1])
            index = tuple(np.rint(voxel[:3]).astype(int))
            np.testing.assert_allclose(voxel[:3], index, atol=1e-6)
            result[index] = number[0].ReferencedSegmentNumber
    return result


@pytest.mark.parametrize("step", [2.5 * NORMAL, [0.3, 0.1, 2.0]], ids=["oblique", "tilted gantry"])
def test_the_same_voxels_in_the_grid_of_the_series(tmp_path, step):
    volume = series(tmp_path / "in", step)
    labels = labels_on(volume)
    dicomseg.write(tmp_path / "out/a.dcm", labels, tmp_path / "in", NAMES)
    np.testing.assert_array_equal(by_position(tmp_path / "out/a.dcm", volume), labels.array)
    again = dicomseg.read(tmp_path / "out/a.dcm", tmp_path / "in", NAMES)
    np.testing.assert_array_equal(again.array, labels.array)
    np.testing.assert_array_equal(again.affine, volume.affine)
    assert again.array.dtype == np.uint8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.dcm"]


def test_each_frame_refers_to_its_slice(tmp_path):
    volume = series(tmp_path / "in")
    dicomseg.write(tmp_path / "a.dcm", labels_on(volume), tmp_path / "in", NAMES)
    found = pydicom.dcmread(tmp_path / "a.dcm")
    headers = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, (tmp_path / "in").iterdir())}
    assert found.NumberOfFrames == 3 + 3  # two structures, three slices each; empty frames are left out
    for groups in found.PerFrameFunctionalGroupsSequence:
        source = headers[groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert groups.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    referred = found.ReferencedSeriesSequence[0]
    assert {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence} == set(headers)
    first = next(iter(headers.values()))
    assert referred.SeriesInstanceUID == first.SeriesInstanceUID != found.SeriesInstanceUID
    assert (found.StudyInstanceUID, found.PatientID, found.PatientName) == (first.StudyInstanceUID, PATIENT, PATIENT)
    assert (found.Modality, found.SegmentationType, found.SOPClassUID.name) == ("SEG", "BINARY", "Segmentation Storage")


def test_a_segment_for_every_structure_with_its_code(tmp_path):
    volume = series(tmp_path / "in")
    dicomseg.write(tmp_path / "a.dcm", labels_on(volume), tmp_path / "in", NAMES)
    segments = pydicom.dcmread(tmp_path / "a.dcm").SegmentSequence
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments]
    assert [segment.SegmentLabel for segment in segments] == list(NAMES.values())
    assert [kind.CodeMeaning for kind in kinds] == ["Liver", "Kidney", "Tissue"]
    assert [segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue for segment in segments] == [
        *("91723000", "91723000", "85756007")
    ]
    assert kinds[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert {segment.SegmentAlgorithmType for segment in segments} == {"AUTOMATIC"}


@pytest.mark.parametrize(
    ("values", "names", "dtype"),
    [
        ((2, 7), {2: "liver", 7: "spleen"}, np.uint8),
        ((7, 300), {7: "a" * 70}, np.uint16),  # a name that is too long, and a value without one
        ((1, 1), {1: "Leber \\ Größe"}, np.uint8),
        ((0, 0), NAMES, np.uint8),
        ((0, 0), {4: "liver"}, np.uint8),
    ],
)
def test_any_values_and_names(tmp_path, capfd, values, names, dtype):
    volume = series(tmp_path / "in")
    labels = labels_on(volume, values, dtype)
    dicomseg.write(tmp_path / "a.dcm", labels, tmp_path / "in", names)
    again = dicomseg.read(tmp_path / "a.dcm", tmp_path / "in", names)
    np.testing.assert_array_equal(again.array, labels.array)
    assert (by_position(tmp_path / "a.dcm", volume) > 0).sum() == (labels.array > 0).sum()
    assert (tmp_path / "a.dcm").stat().st_size < 20_000
    assert capfd.readouterr() == ("", "")


def test_headers_as_hospitals_write_them(tmp_path):
    """Another character set, a sex that the standard does not know, a date that is none, a private element."""
    volume = series(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        header = pydicom.dcmread(path)
        header.SpecificCharacterSet, header.PatientName = "ISO_IR 100", "Müller^Jörg"
        with pydicom.config.disable_value_validation():
            header.PatientSex, header.PatientBirthDate, header.StudyDate = "U", "1960", "20260101"
            header.AccessionNumber = "A" * 30
            header.FrameOfReferenceUID = "1.2.77"
            header.save_as(path)
    dicomseg.write(tmp_path / "a.dcm", labels_on(volume), tmp_path / "in", NAMES)
    found = pydicom.dcmread(tmp_path / "a.dcm")
    assert (str(found.PatientName), found.StudyDate) == ("Müller^Jörg", "20260101")
    assert found.FrameOfReferenceUID == "1.2.77" and not found.PatientSex
    np.testing.assert_array_equal(by_position(tmp_path / "a.dcm", volume), labels_on(volume).array)


def test_what_cannot_be_written_or_read_says_why(tmp_path, monkeypatch):
    volume = series(tmp_path / "in")
    labels, path = labels_on(volume), tmp_path / "a.dcm"
    with pytest.raises(DatasetError, match=r"in: .*Has the folder changed"):
        dicomseg.write(path, Volume(labels.array[:, :, 1:], volume.affine), tmp_path / "in", NAMES)
    with pytest.raises(OutputError, match="at least one structure"):
        dicomseg.write(path, labels_on(volume, (0, 0)), tmp_path / "in", {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        dicomseg.write(tmp_path / "file/a.dcm", labels, tmp_path / "in", NAMES)
    dicomseg.write(path, labels, tmp_path / "in", NAMES)
    with pytest.raises(DatasetError, match="segments liver, kidney_left, pancreas tumor; expected heart"):
        dicomseg.read(path, tmp_path / "in", {1: "heart"})
    series(tmp_path / "other")
    for number, slice_ in enumerate((tmp_path / "other").iterdir()):
        header = pydicom.dcmread(slice_)
        header.SOPInstanceUID = f"1.2.9.{number}"
        header.save_as(slice_)
    with pytest.raises(DatasetError, match="of other slices"):
        dicomseg.read(path, tmp_path / "other", NAMES)
    content = path.read_bytes()
    for size in (0, 100, 1000, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError):
            dicomseg.read(path, tmp_path / "in", NAMES)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(OutputError, match=r'Run: pip install "mambahome-jax\[dicomseg\]"'):
        dicomseg.write(path, labels, tmp_path / "in", NAMES)
    with pytest.raises(DatasetError, match=r'Run: pip install "mambahome-jax\[dicomseg\]"'):
        dicomseg.read(path, tmp_path / "in", NAMES)


@pytest.mark.parametrize("lacks", ["StudyInstanceUID", "SOPInstanceUID"])
def test_a_slice_that_cannot_be_referred_to(tmp_path, lacks):
    volume = series(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        header = pydicom.dcmread(path)
        delattr(header, lacks)
        header.save_as(path, enforce_file_format=False)
    with pytest.raises(DatasetError, match=f"no {lacks}.*Name another --output_format") as caught:
        dicomseg.write(tmp_path / "a.dcm", labels_on(volume), tmp_path / "in", NAMES)
    assert PATIENT not in str(caught.value) and not (tmp_path / "a.dcm").exists()
