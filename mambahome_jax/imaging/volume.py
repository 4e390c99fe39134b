"""Scans and label maps as they are on disk: read through nifti, itk and dicom; NIfTI is written here."""

import contextlib
import json
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import dicom, itk, nifti
from mambahome_jax.imaging.files import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    WRITTEN_SUFFIXES,
    alternatives,
    suffix_of,
    written_whole,
)
from mambahome_jax.imaging.pack import fortran_bytes, gzipped, parts_of
from mambahome_jax.paths import local_path

Forms = tuple[np.ndarray | None, np.ndarray | None, np.ndarray]
_COMMENT = 6  # kind of a NIfTI header extension: plain text


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map with its place in the world.

    array: (D0, D1, D2) or (D0, D1, D2, C), axes in the file's voxel order; its memory order is not promised.
    affine: (4, 4) float64, voxel index (an integer is a voxel's centre) to mm in RAS+.
    """

    array: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        if self.array.ndim not in (3, 4) or self.affine.shape != (4, 4):
            raise ValueError(f"array {self.array.shape}, affine {self.affine.shape}; expected 3 or 4 axes and (4, 4)")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three spatial axes."""
        return self.array.shape[:3]

    @property
    def spacing(self) -> np.ndarray:
        """(3,) float64: distance in mm between neighbouring voxels along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_volume(
    path: str | Path, *, channels: int | None = None, as_stored: bool = False, series: Collection[str] = ()
) -> Volume:
    """Read an image: .nii, .nii.gz, or with the extra [formats] .mha, .mhd, .nrrd or a folder of DICOM slices.

    Returns a Volume of float32, (D0, D1, D2), or (D0, D1, D2, C) where the file has four axes and the last is longer
    than 1. A NIfTI file's affine is the sform where its code is positive and it is not all zero, else the qform, else
    made from the spacing; values are stored value * scl_slope + scl_inter in float64, rounded to float32 (both as
    MONAI's LoadImage).

    channels: how many are expected; None takes any number.
    as_stored: numbers of up to four bytes stay what they are where slope and intercept change nothing; the
      array is then read-only, and int16 takes half of the memory.
    series: SeriesInstanceUIDs, of which a folder of DICOM slices of several series must hold one.
    Raises DatasetError: missing, truncated or damaged file, of another format than its name says, empty, wrong number
    of axes, singular affine, NaN or infinite voxels; SimpleITK not installed; what `dicom.read` refuses.
    """
    path = local_path(path)
    raw, affine, slope, inter = _stored(path, channels, series)
    if as_stored and (slope, inter) == (1.0, 0.0) and raw.dtype.isnative and raw.dtype.itemsize <= 4:
        if raw.dtype.kind == "f":
            _require_finite(path, raw)
        return Volume(raw, affine)
    return Volume(_scale(path, raw, slope, inter), affine)


def read_labels(path: str | Path, *, any_value: bool = False) -> Volume:
    """Read a label map (the formats of `read_volume`) of any stored type whose values are whole numbers.

    Returns a Volume (D0, D1, D2) of uint8, or of uint16 where a label is above 255.
    any_value: negative labels and those above 65535 are taken too; the array is then int64 where there are any.
    Raises DatasetError as `read_volume`, and for labels that are fractional, negative or above 65535.
    """
    path = local_path(path)
    raw, affine, slope, inter = _stored(path, 1)
    if raw.dtype.kind == "f" or (slope, inter) != (1.0, 0.0):
        values = raw.astype(np.float64) * slope + inter
        _require_finite(path, values, "Write 0, the background, or the right label into these voxels.")
        labels = np.rint(values)
        off = np.abs(values - labels)
        if off.max() > 1e-3:
            found = f"label value {values.flat[off.argmax()]:g}"
            raise DatasetError(found, file=path, expected="whole numbers", action="Is this an image, not a label map?")
    else:
        labels = raw
    low, high = labels.min(), labels.max()
    if low >= 0 and high <= 65535:
        return Volume(labels.astype(np.uint8 if high <= 255 else np.uint16), affine)
    if any_value and low >= -(2**53) and high <= 2**53:
        return Volume(labels.astype(np.int64), affine)
    action = "Is this an image? If it is a label map, number its structures by preprocess.py --label_map FILE."
    raise DatasetError(f"label values from {low:g} to {high:g}", file=path, expected="0 to 65535", action=action)


def read_geometry(path: str | Path, *, series: Collection[str] = ()) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (trailing axes of length 1 beyond the third dropped) and affine (4, 4) float64, from headers alone.

    series: as `read_volume` takes it. Raises DatasetError as `read_volume`, as far as headers show it.
    """
    path = local_path(path)
    if not path.is_dir() and not suffix_of(path.name, ITK_SUFFIXES):
        return nifti.read_geometry(path)[:2]
    shape, affine = dicom.read_geometry(path, series) if path.is_dir() else itk.read_geometry(path)
    return nifti.checked_shape(path, shape, None), nifti.usable_affine(path, affine)


def read_forms(path: str | Path) -> tuple[tuple[int, ...], np.ndarray, Callable[[], Forms]]:
    """`read_geometry`, and a function that gives what the NIfTI header says of the geometry in its three ways.

    Forms are sform and qform, (4, 4) float64, voxel to RAS mm, None where the form's code or the sform's numbers are 0;
    and pixdim (3,) in mm.
    Raises DatasetError as `read_volume`; the function does for a qform whose numbers are no rotation.
    """
    path = local_path(path)
    shape, affine, header = nifti.read_geometry(path)
    return shape, affine, lambda: _forms(path, header)


def _forms(path: Path, header: nib.Nifti1Header) -> Forms:
    try:
        with np.errstate(all="ignore"):
            qform = header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError) as error:
        raise DatasetError(f"damaged qform ({error})", file=path, expected="a rotation") from error
    sform = header.get_sform(coded=True)[0]
    if sform is not None and not sform[:3, :3].any():
        sform = None
    return sform, qform, np.abs(np.asarray(header["pixdim"][1:4], np.float64))


def write_volume(
    path: str | Path, volume: Volume, dtype: np.dtype | type | str | None = None, names: Mapping[int, str] | None = None
) -> None:
    """Write a Volume to .nii, .nii.gz, .mha or .nrrd, whole or not at all: beside its place first, then renamed.

    dtype: stored type (default: the array's own; bool as uint8, int64 as int32, any float as float32). In NIfTI the
    affine goes into the sform, and into the qform too unless it is sheared, both with code 1. Same volume, same bytes,
      however many cores pack it; those of .nii.gz differ with and without isal, and may between kinds of processor.
    names: of label values, kept in a NIfTI header as a comment extension: the JSON text {"labels": {"1": "liver"}}.
    Raises OutputError: a folder that cannot be written, a full disk, a wrong suffix, values that `dtype` cannot hold,
    SimpleITK not installed where .mha or .nrrd needs it.
    """
    path = local_path(path)
    if not path.name.endswith(WRITTEN_SUFFIXES):
        expected = alternatives(WRITTEN_SUFFIXES)
        raise OutputError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; expected {expected}")
    array = _as_stored(path, volume.array, dtype)
    if not path.name.endswith(NIFTI_SUFFIXES):
        itk.write(path, array, volume.affine, names)
        return
    header = _header_for(array, volume.affine)
    extension = _names_extension(names) if names else bytes(4)
    header["vox_offset"] = 348 + len(extension)
    content = bytes(header.binaryblock) + extension
    with written_whole(path) as partial, partial.open("wb") as file:
        if path.name.endswith(".gz"):
            # A disk that is full must not leave threads behind.
            with contextlib.closing(gzipped(content, array)) as pieces:
                file.writelines(pieces)
        else:
            file.write(content)
            file.writelines(map(fortran_bytes, parts_of(array)))


def _stored(
    path: Path, channels: int | None, series: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Voxels as they are stored, affine, and what they are to be multiplied by and added to."""
    if path.is_dir() or suffix_of(path.name, ITK_SUFFIXES):
        raw, affine = dicom.read(path, series) if path.is_dir() else itk.read(path)
        return (
            raw.reshape(nifti.checked_shape(path, raw.shape, channels), order="F"),
            nifti.usable_affine(path, affine),
            1.0,
            0.0,
        )
    header, voxels = nifti.read(path, channels)
    return voxels, nifti.affine_of(path, header), *nifti.slope_inter(path, header)


def _scale(path: Path, raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    values = np.empty(raw.shape, np.float32, order="F")
    # Slices keep the float64 intermediate small: a whole one would be four times the size of an int16 scan.
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(raw.shape[2]):
            part = raw[:, :, k]
            values[:, :, k] = part if (slope, inter) == (1.0, 0.0) else part.astype(np.float64) * slope + inter
    if raw.dtype.kind == "f" or (slope, inter) != (1.0, 0.0):
        _require_finite(path, values)
    return values


def _require_finite(
    path: Path,
    values: np.ndarray,
    action: str = "Replace them, for example by the intensity of air, before preprocessing.",
) -> None:
    # A float64 sum of float32 values is finite exactly if they all are; it needs no mask of the volume's size.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return
    count = int(np.count_nonzero(~np.isfinite(values)))
    if count:
        raise DatasetError(f"{count} voxels are NaN or infinite", file=path, expected="finite numbers", action=action)


def _as_stored(path: Path, array: np.ndarray, dtype: np.dtype | type | str | None) -> np.ndarray:
    if dtype is None:
        dtype = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype)
        dtype = {np.int64: np.int32, np.uint64: np.uint32}.get(np.dtype(dtype).type, dtype)
    target = np.dtype(dtype).newbyteorder("=")
    with np.errstate(invalid="ignore", over="ignore"):
        stored = array.astype(target, copy=False)
    if target.kind in "iu" and not np.can_cast(array.dtype, target) and not np.array_equal(stored, array):
        found = f"values from {array.min():g} to {array.max():g} of type {array.dtype}"
        raise OutputError(f"{path}: cannot write {found} as {target}")
    return stored


def _header_for(array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), 1.0)[: array.ndim])
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    # A qform cannot hold shear; one that disagrees with the sform would move the scan in programs that prefer it.
    if not np.allclose(header.get_qform(), affine, rtol=0, atol=1e-3):
        header.set_qform(None, code=0)
    header["magic"] = b"n+1"
    return header


def _names_extension(names: Mapping[int, str]) -> bytes:
    text = json.dumps({"labels": {str(value): name for value, name in sorted(names.items())}}).encode()
    # Four bytes that announce it, then size and kind as int32 and the text, padded so that the size divides by 16.
    size = -(-(8 + len(text)) // 16) * 16
    return b"\x01\0\0\0" + struct.pack("<ii", size, _COMMENT) + text.ljust(size - 8, b"\0")
