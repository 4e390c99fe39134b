"""A label map as DICOM SEG, beside the series that it was made from, through highdicom (extra [dicomseg]).

One binary segment a structure, numbered in order of label value. A frame is kept where the structure has voxels, at the
position of the slice that it lies on and with a reference to it, so that a PACS shows both together. Unlike any other
result such a file names the patient: attributes of patient and study are those of the series, as the standard demands.
highdicom and pydicom are imported at first use.
"""

import contextlib
import importlib
import importlib.util
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import dicom, itk
from mambahome_jax.imaging.volume import Volume, count_values, replace_values
from mambahome_jax.support.files import atomic_write
from mambahome_jax.version import __version__

INSTALL = 'pip install "mambahome-jax[dicomseg]"'
# Of the first slice everything but its pixels is read, of the others what places them and what they are called.
_PLACING = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
)
# What a SEG must have, if empty, and scanners leave out.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName"),
)
# Of these, what highdicom refuses where it is no date or time.
_DATES = {"PatientBirthDate": "DA", "StudyDate": "DA", "StudyTime": "TM"}
# What a slice must say to be referred to. Names of its standard, which hold nothing of a patient.
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_SIDES = {"left": "Left", "l": "Left", "right": "Right", "r": "Right"}
# Words of a structure's name without its side -> keyword of its SNOMED code; others are tissue.
_ORGANS = {
    **{
        name: name.capitalize() for name in ("liver", "spleen", "kidney", "pancreas", "stomach", "gallbladder", "aorta")
    },
    **{name: name.capitalize() for name in ("esophagus", "duodenum", "colon", "prostate", "uterus", "bladder")},
    **{name: name.capitalize() for name in ("heart", "lung", "trachea", "brain", "hippocampus")},
    **{"gall bladder": "Gallbladder", "oesophagus": "Esophagus", "urinary bladder": "Bladder"},
    **{"adrenal gland": "AdrenalGland", "portal vein": "PortalVein", "small bowel": "SmallIntestine"},
    **{"inferior vena cava": "InferiorVenaCava", "postcava": "InferiorVenaCava", "ivc": "InferiorVenaCava"},
}
_LONGEST_LABEL = 64
_FAULTS = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)  # of highdicom and pydicom


def installed() -> bool:
    """Whether highdicom and SimpleITK, which reads the series, can be imported."""
    return importlib.util.find_spec("highdicom") is not None and itk.installed()


def write(path: Path, labels: Volume, folder: Path, names: Mapping[int, str], series: Collection[str] = ()) -> None:
    """Write a label map on the grid of a series to a DICOM SEG file, whole or not at all.

    names: value -> structure, a segment each even if it has no voxel; other values are label_<value>.
    Raises OutputError: highdicom is not installed, a folder that cannot be written, a full disk. DatasetError: the
    series cannot be read or is another than that of the labels; what a SEG must repeat is missing or wrong in it.
    """
    highdicom = _highdicom(path)
    stack = dicom.read_stack(folder, series)
    if stack.shape != labels.shape:
        action = "Has the folder changed meanwhile? Segment it again."
        raise DatasetError(f"{stack.shape} voxels", file=folder, expected=f"{labels.shape}", action=action)
    present = sorted({*names, *count_values(labels.array)} - {0})
    values = {value: names.get(value, f"label_{value}") for value in present}
    if not values:
        raise OutputError(f"{path}: a DICOM SEG needs at least one structure, and the label map names none")
    numbers = {value: number for number, value in enumerate(present, start=1)}
    planes = replace_values(labels.array, numbers).transpose(2, 1, 0)
    with _as_they_are(folder):
        sources = _headers(stack.slices)
        place: dict[str, Any] = {}
        if not planes.any():
            # highdicom would keep every frame of every structure; one of each says the same.
            position = highdicom.PlanePositionSequence("PATIENT", image_position=list(sources[0].ImagePositionPatient))
            planes, place = planes[:1], {"plane_positions": [position], "omit_empty_frames": False}
        spacing = [float(value) for value in sources[0].PixelSpacing]
        between = float(labels.spacing[2])
        measures = highdicom.PixelMeasuresSequence(
            pixel_spacing=spacing,
            slice_thickness=float(sources[0].get("SliceThickness") or between),
            spacing_between_slices=between,
        )
        # As the source writes it: sixteen characters would not hold every number that a float can be.
        measures[0].PixelSpacing = sources[0].PixelSpacing
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=planes,
            segmentation_type="BINARY",
            segment_descriptions=_descriptions(highdicom, values.values(), __version__),
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="mambahome-jax",
            manufacturer_model_name="mambahome-jax",
            software_versions=__version__,
            device_serial_number=__version__,
            content_label="SEGMENTATION",
            content_description="Automatic segmentation",
            series_description="Automatic segmentation",
            specific_character_set="ISO_IR 192",
            pixel_measures=measures,
            **place,
        )
        with atomic_write(path) as partial:
            segmentation.save_as(partial)


def read(path: Path, folder: Path, names: Mapping[int, str], series: Collection[str] = ()) -> Volume:
    """Read what `write` wrote, uint8 or uint16 beyond 255. folder, names, series: as they were given to it.

    Raises DatasetError: highdicom is not installed, a file that is damaged, no SEG, of another series or other
    structures; the series cannot be read.
    """
    if not path.is_file():
        raise DatasetError("no such file", file=path)
    try:
        highdicom = _highdicom(path)
    except OutputError as error:
        raise DatasetError("highdicom is not installed", file=path, action=f"Run: {INSTALL}") from error
    stack = dicom.read_stack(folder, series)
    pydicom = importlib.import_module("pydicom")
    tags = ["SOPInstanceUID"]
    with _as_they_are(path):
        uids = [
            pydicom.dcmread(one.path, specific_tags=tags, stop_before_pixels=True, force=True).SOPInstanceUID
            for one in stack.slices
        ]
        segmentation = highdicom.seg.segread(path)
        referred = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        if {item.ReferencedSOPInstanceUID for item in referred} != set(uids):
            raise DatasetError("a DICOM SEG of other slices", file=path, expected=f"one of those in {folder}")
        segments = [str(segmentation.get_segment_description(n).segment_label) for n in segmentation.segment_numbers]
        known = {_label(name): value for value, name in names.items()}
        numbers = [re.fullmatch(r"label_(\d+)", name) for name in segments]
        values = [
            known.get(name, int(number[1]) if number else 0) for name, number in zip(segments, numbers, strict=True)
        ]
        if 0 in values or not set(known) <= set(segments):
            expected = ", ".join(known)
            raise DatasetError(
                f"segments {', '.join(segments)}", file=path, expected=expected, action="Segment it again."
            )
        planes = segmentation.get_pixels_by_source_instance(
            uids, combine_segments=True, assert_missing_frames_are_empty=True, skip_overlap_checks=True, dtype=np.uint16
        )
    table = np.array([0, *values], np.uint16)
    table = table.astype(np.uint8) if table.max() <= 255 else table
    return Volume(table[planes].transpose(2, 1, 0), stack.affine)


def _highdicom(path: Path) -> Any:
    try:
        return importlib.import_module("highdicom")
    except ImportError as error:
        raise OutputError(f"{path}: highdicom, which writes it, is not installed. Run: {INSTALL}") from error


def _headers(slices: Sequence[dicom.Slice]) -> list[Any]:
    """Headers of the slices, in their order, the first whole, with empty values where it lacks what may be empty."""
    pydicom = importlib.import_module("pydicom")
    headers: list[Any] = []
    for one in slices:
        tags = list(_PLACING) if headers else None
        header = pydicom.dcmread(one.path, stop_before_pixels=True, specific_tags=tags, force=True)
        missing = [name for name in _NEEDED if not header.get(name)]
        if missing:
            fault, expected = f"no {' and no '.join(missing)}", "a slice that can be referred to"
            raise DatasetError(fault, file=one.path, expected=expected, action="Name another --output_format.")
        headers.append(header)
    for name in _MAY_BE_EMPTY:
        if name not in headers[0]:
            setattr(headers[0], name, None)
    if headers[0].PatientSex not in ("M", "F", "O"):
        headers[0].PatientSex = None
    for name, kind in _DATES.items():
        try:
            getattr(pydicom.valuerep, kind)(getattr(headers[0], name))
        except ValueError:
            setattr(headers[0], name, None)
    frame = headers[0].get("FrameOfReferenceUID") or pydicom.uid.generate_uid()
    for header in headers:
        header.FrameOfReferenceUID = frame
    return headers


def _descriptions(highdicom: Any, names: Any, version: str) -> list[Any]:
    codes = importlib.import_module("pydicom.sr.codedict").codes
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="Mamba-HoME", family=codes.DCM.ArtificialIntelligence, version=version
    )
    described = []
    for number, name in enumerate(names, start=1):
        words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
        organ = _ORGANS.get(" ".join(word for word in words if word not in _SIDES))
        kind = highdicom.sr.CodedConcept.from_code(getattr(codes.SCT, organ or "Tissue"))
        sides = [_SIDES[word] for word in words if word in _SIDES]
        if organ and sides:
            side = highdicom.sr.CodedConcept.from_code(getattr(codes.SCT, sides[0]))
            kind.SegmentedPropertyTypeModifierCodeSequence = [side]
        description = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=_label(name),
            segmented_property_category=codes.SCT.AnatomicalStructure if organ else codes.SCT.Tissue,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        described.append(description)
    return described


def _label(name: str) -> str:
    """A name as a segment's label may be: 64 characters, no backslash, no control characters, no space around."""
    return re.sub(r"[\\\x00-\x1f\x7f]", "/", name)[:_LONGEST_LABEL].strip() or "unnamed"


@contextlib.contextmanager
def _as_they_are(file: Path) -> Iterator[None]:
    """Values of headers are taken as they are, without a word of them in a warning or a message.

    Raises DatasetError: what highdicom and pydicom raise, by its kind alone, as its text may quote a patient's data.
    """
    pydicom = importlib.import_module("pydicom")
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except (DatasetError, OutputError):
        raise
    except (*_FAULTS, pydicom.errors.InvalidDicomError) as error:
        fault = f"headers that no DICOM SEG can be made of or read from ({type(error).__name__})"
        action = "Export the series again, or name another --output_format."
        raise DatasetError(fault, file=file, expected="values as the standard has them", action=action) from error
