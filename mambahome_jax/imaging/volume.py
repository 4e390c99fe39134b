"""Scans and label maps as they are on disk: read through nifti, itk and dicom."""

import io
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import dicom, itk, nifti
from mambahome_jax.imaging.formats import ITK_SUFFIXES, NIFTI_SUFFIXES, WRITTEN_SUFFIXES, alternatives, suffix_of
from mambahome_jax.imaging.header import Header, header_of, itk_place, nifti_header, require_scale, usable_affine
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import atomic_write
from mambahome_jax.support.keywords import checked
from mambahome_jax.support.paths import openable_path

_SLAB = 1 << 20  # voxels that are counted at a time


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map with its place in the world.

    array: (D0, D1, D2) or (D0, D1, D2, C), axes in the file's voxel order; its memory order is not promised.
    affine: (4, 4) float64, voxel index (an integer is a voxel's centre) to mm in RAS+.
    header: what the scan's file says of its place beyond the affine, None where there is no file. Hand it on to what is
    made of the scan, so that it lies on the scan in every program when it is written.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Header | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise DatasetError(f"affine is {self.affine!r}", expected="(4, 4) numbers") from error
        shape = getattr(self.array, "shape", None)
        if shape is None:
            raise DatasetError(f"array is a {type(self.array).__name__}", expected="an array of NumPy")
        if len(shape) not in (3, 4) or self.affine.shape != (4, 4):
            raise DatasetError(f"array {shape}, affine {self.affine.shape}", expected="3 or 4 axes and (4, 4)")

    def __repr__(self) -> str:
        """Say size, type, voxel size, axes and values in one line."""
        array = np.asarray(self.array)
        size = " x ".join(map(str, array.shape))
        mm = " x ".join(f"{length:.4g}" for length in self.spacing)
        axes = "".join(letter or "?" for letter in nib.orientations.aff2axcodes(self.affine))
        values = f", {array.min():g}..{array.max():g}" if array.size and array.dtype.kind in "biuf" else ""
        return f"Volume {size} {array.dtype}, {mm} mm, {axes}{values}"

    def _repr_png_(self) -> bytes:
        """The picture of `show`, for notebooks."""
        from mambahome_jax.imaging.pictures import show  # which draws volumes

        content = io.BytesIO()
        show(self).save(content, format="PNG")
        return content.getvalue()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three spatial axes."""
        return self.array.shape[:3]

    @property
    def spacing(self) -> np.ndarray:
        """(3,) float64: distance in mm between neighbouring voxels along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def grids(self) -> list[np.ndarray]:
        """Where programs see the voxels: the affine, then what else the header says, (4, 4) each."""
        return [self.affine] if self.header is None else self.header.grids(self.affine)


def require_volume(name: str, value: object) -> None:
    """Raise DatasetError, naming it, for an argument that is no Volume."""
    if not isinstance(value, Volume):
        action = "Give the affine of its voxels too, np.diag([*spacing, 1]) where nothing else is known."
        raise DatasetError(f"{name} is a {type(value).__name__}", expected="Volume(array, affine)", action=action)


@checked
def read_volume(
    path: str | Path,
    *,
    channels: int | None = None,
    as_stored: bool = False,
    series: Collection[str] = (),
    spacing_scale: float | None = None,
) -> Volume:
    """Read an image: .nii, .nii.gz, or with the extra [formats] .mha, .mhd, .nrrd or a folder of DICOM slices.

    Gives float32 (D0, D1, D2), or (D0, D1, D2, C) where the file has four axes and the last is longer than 1, or five
    and the fourth is 1 long, as ITK writes vectors. NIfTI as MONAI's LoadImage: the affine is the sform where its code
    is positive and it is not all zero, else the qform, else by the spacing, brought to mm as `xyzt_units` says; values
    are stored value * scl_slope + scl_inter in float64, rounded to float32.

    Args:
        channels: how many are expected; None takes any number.
        as_stored: numbers of up to four bytes stay what they are where slope and intercept change nothing; the array
            is then read-only, and int16 takes half of the memory.
        series: SeriesInstanceUIDs, of which a folder of DICOM slices of several series must hold one.
        spacing_scale: what the lengths of a wrong header are multiplied by; 1 takes a scan of any size as it is.

    Raises:
        DatasetError: a missing, truncated or damaged file, of another format than its name says, empty, of other axes,
            less than 5 mm or more than 5 m in extent; voxels that are NaN or infinite; SimpleITK is not installed.
        ConfigError: a spacing_scale that is not above 0, a URL.
    """
    path = openable_path(path)
    raw, header, slope, inter = _read(path, channels, spacing_scale, series)
    if as_stored and (slope, inter) == (1.0, 0.0) and raw.dtype.isnative and raw.dtype.itemsize <= 4:
        if raw.dtype.kind == "f":
            _require_finite(path, raw)
        return Volume(raw, header.affine, header)
    return Volume(_scale(path, raw, slope, inter), header.affine, header)


def read_labels(path: str | Path, *, any_value: bool = False, spacing_scale: float | None = None) -> Volume:
    """Read a label map of any stored type: (D0, D1, D2) uint8, or uint16 where a label is above 255.

    Args:
        any_value: take negative labels and those above 65535 too; the array is then int64 where there are any.
        spacing_scale: as `read_volume` takes it.

    Raises:
        DatasetError: as `read_volume`; labels that are fractional, negative or above 65535.
    """
    path = openable_path(path)
    raw, header, slope, inter = _read(path, 1, spacing_scale)
    if raw.dtype.kind == "f" or (slope, inter) != (1.0, 0.0):
        values = raw.astype(np.float64) * slope + inter
        _require_finite(path, values, "Write 0, the background, or the right label into these voxels.")
        labels = np.rint(values)
        off = np.abs(values - labels)
        if off.max() > 1e-3:
            fault = f"label value {values.flat[off.argmax()]:g}"
            raise DatasetError(fault, file=path, expected="whole numbers", action="Is this an image, not a label map?")
    else:
        labels = raw
    low, high = labels.min(), labels.max()
    if low >= 0 and high <= 65535:
        return Volume(labels.astype(np.uint8 if high <= 255 else np.uint16), header.affine, header)
    if any_value and low >= -(2**53) and high <= 2**53:
        return Volume(labels.astype(np.int64), header.affine, header)
    action = "Is this an image? If it is a label map, number its structures, as preprocess.py --label_map FILE does."
    raise DatasetError(f"label values from {low:g} to {high:g}", file=path, expected="0 to 65535", action=action)


def read_grid(path: str | Path, *, series: Collection[str] = (), spacing_scale: float | None = None) -> Volume:
    """Read what `read_volume` gives from headers alone: every voxel is 0. Raises as it, as far as headers show it."""
    raw, header, *_ = _read(openable_path(path), None, spacing_scale, series, voxels=False)
    return Volume(raw, header.affine, header)


@checked
def write_volume(
    path: str | Path,
    volume: Volume,
    dtype: np.dtype | type | str | None = None,
    names: Mapping[int, str] | None = None,
    *,
    warn: bool = True,
) -> str | None:
    """Write a volume to .nii, .nii.gz, .mha or .nrrd, whole or not at all; returns what it warns of, if anything.

    A volume with a header lies where every program sees the scan: in NIfTI that scan's forms, codes and unit stay. One
    without has its affine in the sform, and in the qform too unless it is sheared, both with code 1. The same volume
    gives the same bytes, however many cores pack it; those of .nii.gz differ with and without isal.

    Args:
        dtype: stored type; None for the array's own, bool as uint8, int64 as int32, any float as float32.
        names: of label values, kept in a NIfTI header as a comment extension: the JSON text {"labels": {"1": "liver"}}.
        warn: of a place that the format cannot say to ITK programs; the warning names formats that can.

    Raises:
        OutputError: a folder that cannot be written, a full disk, a wrong suffix, values that `dtype` cannot hold,
            SimpleITK not installed where .mha or .nrrd needs it.
        ConfigError: a URL.
    """
    path = openable_path(path)
    require_volume("volume", volume)
    if not path.name.endswith(WRITTEN_SUFFIXES):
        expected = alternatives(WRITTEN_SUFFIXES)
        raise OutputError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; expected {expected}")
    array = _as_stored(path, volume.array, dtype)
    if not path.name.endswith(NIFTI_SUFFIXES):
        itk.write(path, array, itk_place(volume.affine, volume.header), names)
        return None
    header, note = nifti_header(array.shape, array.dtype, volume.affine, volume.header)
    with atomic_write(path) as partial:
        nifti.write(partial, array, header, names)
    if note is not None and warn:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return note


def count_values(label: np.ndarray) -> dict[int, int]:
    """Voxels of each value that occurs in a label map of uint8 or uint16, by value."""
    flat = label.ravel(order="K")
    counts = np.zeros(1, np.int64)
    # bincount widens what it is given to int64: eight times a label map, were it not for the slabs.
    for start in range(0, flat.size, _SLAB):
        part = np.bincount(flat[start : start + _SLAB], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def replace_values(array: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """A label map (any shape, integers) with its values replaced, 0 where `table` has none.

    table: stored value, of any size and sign -> value from 0 to 65535. Returns uint8, or uint16 beyond 255.
    """
    dtype = np.uint8 if max(table.values(), default=0) <= 255 else np.uint16
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        lookup = np.zeros(max([*table, int(array.max(initial=0)), 0]) + 1, dtype)
        for stored, value in table.items():
            if stored >= 0:
                lookup[stored] = value
        return lookup[array]
    values, places = np.unique(array, return_inverse=True)
    lookup = np.array([table.get(int(value), 0) for value in values], dtype)
    # Label maps of files have their first axis fastest, and stay so.
    return np.asfortranarray(lookup[places].reshape(array.shape))


def _read(
    path: Path, channels: int | None, spacing_scale: float | None, series: Collection[str] = (), *, voxels: bool = True
) -> tuple[np.ndarray, Header, float, float]:
    """Read voxels as they are stored, zeros without `voxels`, their header, and slope and intercept of the values."""
    require_scale(spacing_scale)
    if path.is_dir() or suffix_of(path.name, ITK_SUFFIXES):
        if voxels:
            raw, affine = dicom.read(path, series) if path.is_dir() else itk.read(path)
            raw = raw.reshape(nifti.checked_shape(path, raw.shape, channels), order="F")
        else:
            where = dicom.read_stack(path, series) if path.is_dir() else itk.read_geometry(path)
            shape, affine = where.shape, where.affine
            raw = np.broadcast_to(np.uint8(0), nifti.checked_shape(path, shape, channels))
        return raw, header_of(path, usable_affine(path, affine), raw.shape, None, spacing_scale), 1.0, 0.0
    headers, raw = nifti.read(path, channels, voxels=voxels)
    header = header_of(path, nifti.affine_of(path, headers.mended), raw.shape, headers.stored, spacing_scale)
    return raw, header, *nifti.slope_inter(path, headers.mended)


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
        raise DatasetError(
            f"{counted(count, 'voxel', 'are')} NaN or infinite", file=path, expected="finite numbers", action=action
        )


def _as_stored(path: Path, array: np.ndarray, dtype: np.dtype | type | str | None) -> np.ndarray:
    if dtype is None:
        dtype = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype)
        dtype = {np.int64: np.int32, np.uint64: np.uint32}.get(np.dtype(dtype).type, dtype)
    try:
        target = np.dtype(dtype).newbyteorder("=")
    except TypeError as error:
        raise OutputError(f"{path}: cannot write type {dtype!r}; expected one of NumPy, such as uint8") from error
    with np.errstate(invalid="ignore", over="ignore"):
        stored = array.astype(target, copy=False)
    if target.kind in "iu" and not np.can_cast(array.dtype, target) and not np.array_equal(stored, array):
        fault = f"values from {array.min():g} to {array.max():g} of type {array.dtype}"
        raise OutputError(f"{path}: cannot write {fault} as {target}")
    return stored
