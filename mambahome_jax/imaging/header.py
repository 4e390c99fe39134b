"""What a scan's file says of its place beyond one affine, and what a file written beside the scan is to say.

A NIfTI header has two forms, and programs disagree on which of them to go by: nibabel, FSL and SPM by the sform, ITK by
rules of its own (`itk_form`). So one affine cannot say where every program sees a scan.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mambahome_jax.errors import ConfigError, DatasetError

# Codes of `xyzt_units` for metres and microns; ITK takes every other one for millimetres.
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
_ORTHONORMAL = 1e-4  # by how much ITK lets products of an sform's axes differ from 0 and 1
_QUATERNION = 1e-7  # square of a quaternion's real part below which ITK takes it for 0
_SMALLEST, _LARGEST = 5.0, 5000.0  # mm along the longest axis of a scan
_ORDINARY = 0.3  # mm between voxels from which on a few of them are a part cut out of a scan
_LONGEST = 1e12  # mm: what lies beyond is none, and its squares and products would overflow
_NOTED = 0.01  # voxels by which an ITK program may show a file elsewhere without a word
_QFORM_MISS = 0.1  # voxels by which a qform may differ from the sform, which alone can say shear
_LONGEST_AXIS = 32767  # voxels that NIfTI-1 can say
_PLACE = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"),
)
_VECTORS = (1006, 1007)  # intent codes of values along the fifth axis
ROUNDING_VOXELS = 1e-3  # by which two places may differ that are one, as float32 and text round them
_CORNERS = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)])


@dataclass(frozen=True, eq=False)
class Header:
    """The place of a scan as its file has it.

    affine: (4, 4) float64, voxel to RAS mm, of the volume that was read; on another grid both affines together say
      which voxel became which. shape: of the spatial axes.
    nifti: header as a NIfTI file stores it, not to be changed; None for other formats, which have one grid.
    scale: mm to a unit of the file's lengths, with what `spacing_scale` asked for. intent: NIfTI's code, 0 for none.
    """

    affine: np.ndarray
    shape: tuple[int, ...]
    nifti: nib.Nifti1Header | None = None
    scale: float = 1.0
    intent: int = 0

    @property
    def file_affine(self) -> np.ndarray:
        """(4, 4): `affine` in the file's own unit."""
        return scaled(self.affine, 1 / self.scale)

    def grids(self, affine: np.ndarray) -> list[np.ndarray]:
        """Where programs see the voxels of a volume with this affine: (4, 4) each, voxel to RAS mm, that first."""
        if self.nifti is None:
            return [affine]
        forms = (qform_of(self.nifti), itk_form(self.nifti))
        moved = self.voxel_map(affine)
        return [affine, *(scaled(form, self.scale) @ moved for form in forms if form is not None)]

    def voxel_map(self, affine: np.ndarray) -> np.ndarray:
        """(4, 4) from voxels of a volume with this affine to those of the file."""
        if affine is self.affine or np.array_equal(affine, self.affine):
            return np.eye(4)
        # Flips and permutations come out exactly, whatever the noise of the matrix product.
        return np.round(np.linalg.inv(self.affine) @ affine, 9)

    def in_mm(self) -> "Header":
        """The header for files that are to be in mm whatever the unit of this one is, without its intent."""
        if self.scale == 1:
            return replace(self, intent=0)
        if self.nifti is None:
            return Header(self.affine, self.shape)
        nifti = self.nifti.copy()
        # qfac, the first of pixdim, is no length.
        nifti["pixdim"][1:4] *= self.scale
        for name in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
            nifti[name] *= self.scale
        nifti["xyzt_units"] = 2
        return Header(self.affine, self.shape, nifti)


def header_of(
    path: Path,
    affine: np.ndarray,
    shape: tuple[int, ...],
    nifti: nib.Nifti1Header | None = None,
    spacing_scale: float | None = None,
) -> Header:
    """Make the header of a file that was read. affine: in the file's unit. spacing_scale: as `read_volume` takes it.

    Raises DatasetError: a scan of less than 5 mm or more than 5 m. ConfigError: a scale that is not above 0.
    """
    scale = (1.0 if nifti is None else mm_per_unit(nifti)) * require_scale(spacing_scale)
    header = Header(scaled(affine, scale), shape[:3], nifti, scale, 0 if nifti is None else int(nifti["intent_code"]))
    if spacing_scale != 1:
        _require_extent(path, header)
    return header


def require_scale(spacing_scale: float | None) -> float:
    """The number itself, 1 for None. Raises ConfigError: not finite, or not above 0."""
    if spacing_scale is None:
        return 1.0
    if not 0 < spacing_scale < np.inf:
        raise ConfigError(f"--spacing_scale {spacing_scale}; expected a number above 0, such as 1000, 1 or 0.001")
    return float(spacing_scale)


def _require_extent(path: Path, header: Header) -> None:
    # Plain numbers: of thousands of headers NumPy's calls on three values would be most of the time.
    spacing, size = np.linalg.norm(header.affine[:3, :3], axis=0).tolist(), header.shape
    # A single slice is as thick as its header likes.
    counted = [axis for axis in range(3) if size[axis] > 1] or range(3)
    longest = max(spacing[axis] * size[axis] for axis in counted)
    if longest > _LARGEST or (longest < _SMALLEST and max(spacing[axis] for axis in counted) < _ORDINARY):
        lengths = [mm * n for mm, n in zip(spacing, size, strict=True)]
        extent, voxels = (" x ".join(f"{n:.4g}" for n in numbers) for numbers in (lengths, size))
        fault, factor = f"a scan of {extent} mm ({voxels} voxels)", 0.001 if longest > _LARGEST else 1000
        action = (
            f"Are its lengths in another unit than the header says? --spacing_scale {factor} (in Python "
            f"spacing_scale={factor}) multiplies them; --spacing_scale 1 takes them as they are."
        )
        raise DatasetError(fault, file=path, expected="5 mm to 5 m along the longest axis", action=action)


def scaled(affine: np.ndarray, factor: float) -> np.ndarray:
    """An affine (4, 4) whose lengths are multiplied; itself for 1."""
    return affine if factor == 1 else affine * [[factor], [factor], [factor], [1]]


def mm_per_unit(nifti: nib.Nifti1Header) -> float:
    """What lengths of a NIfTI header are multiplied by to be mm, as ITK does."""
    return _MM_PER_UNIT.get(int(nifti["xyzt_units"]) & 7, 1.0)


def itk_form(nifti: nib.Nifti1Header) -> np.ndarray | None:
    """(4, 4) in the file's unit, where ITK 5.3 and later sees the voxels of a NIfTI file; None where it refuses it.

    It takes direction and origin of an sform at right angles where its code is 1 or there is no qform, else the qform;
    with neither it begins at 0, left and posterior from there. Spacing is pixdim in any case.
    """
    pixdim = pixdim_of(nifti)
    if nifti["sform_code"] > 0 and (nifti["sform_code"] == 1 or nifti["qform_code"] <= 0):
        sform = _numbers([nifti["srow_x"], nifti["srow_y"], nifti["srow_z"], [0, 0, 0, 1]])
        axes = sform[:3, :3] / np.linalg.norm(sform[:3, :3], axis=0) if _usable(sform) else np.zeros((3, 3))
        if np.abs(axes @ axes.T - np.eye(3)).max() <= _ORTHONORMAL:
            form = nib.affines.from_matvec(axes * pixdim, sform[:3, 3])
            return form if _usable(form) else None
    if nifti["qform_code"] > 0:
        return qform_of(nifti)
    form = np.diag([-pixdim[0], -pixdim[1], pixdim[2], 1])
    return form if nifti["sform_code"] <= 0 and _usable(form) else None


def qform_of(nifti: nib.Nifti1Header) -> np.ndarray | None:
    """(4, 4) in the file's unit, as ITK makes it of the quaternion; None where its code is 0 or it is no place."""
    vector = _numbers([nifti["quatern_b"], nifti["quatern_c"], nifti["quatern_d"]])
    if nifti["qform_code"] <= 0 or not (np.abs(vector) <= _LONGEST).all():
        return None
    real = 1 - float(vector @ vector)
    if real < _QUATERNION:
        vector, real = vector / np.linalg.norm(vector), 0.0
    rotation = nib.quaternions.quat2mat([np.sqrt(real), *vector])
    pixdim = pixdim_of(nifti) * [1, 1, -1 if nifti["pixdim"][0] < 0 else 1]
    origin = _numbers([nifti[f"qoffset_{axis}"] for axis in "xyz"])
    form = nib.affines.from_matvec(rotation * pixdim, origin)
    return form if _usable(form) else None


def usable_affine(path: Path | None, affine: np.ndarray) -> np.ndarray:
    """Give the affine (4, 4) itself. Raises DatasetError: not finite, singular, or of no size on earth."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0) if _usable(affine) else np.ones(3)
    if not _usable(affine) or not abs(np.linalg.det(affine[:3, :3])) > 1e-6 * spacing.prod():
        expected = "three independent axes of positive length"
        action = "Mend the geometry in its header (NIfTI: sform, qform or pixdim)."
        raise DatasetError(f"singular affine {affine[:3].tolist()}", file=path, expected=expected, action=action)
    return affine


def _usable(form: np.ndarray) -> bool:
    """Whether a form's numbers can be a place: those of damaged headers are of any size."""
    within = bool((np.abs(form) <= _LONGEST).all())
    return within and bool((np.linalg.norm(form[:3, :3], axis=0) >= 1 / _LONGEST).all())


def pixdim_of(nifti: nib.Nifti1Header) -> np.ndarray:
    """(3,) float64: lengths of the voxels in the file's unit, 1 where there is none."""
    pixdim = _numbers(nifti["pixdim"][1:4])
    return np.where((pixdim == 0) | ~np.isfinite(pixdim), 1, pixdim)


def _numbers(values: Any) -> np.ndarray:
    # Of damaged headers some are no numbers, which NumPy would warn of without a file's name.
    with np.errstate(invalid="ignore"):
        return np.array(values, np.float64)


def grid_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far apart two grids of one shape lie at the corner that differs most: voxels of the first, and mm."""
    if np.array_equal(affine, other):
        return 0.0, 0.0
    corners = _CORNERS * [*(n - 1 for n in shape[:3]), 1]
    shift_mm = (corners @ (other - affine).T)[:, :3]
    shift = np.abs(shift_mm @ np.linalg.inv(affine[:3, :3]).T).max()
    return float(shift), float(np.linalg.norm(shift_mm, axis=1).max())


def nifti_header(
    shape: tuple[int, ...], dtype: np.dtype, affine: np.ndarray, header: Header | None
) -> tuple[nib.Nifti1Header, str | None]:
    """Make the header of a NIfTI file, and a note where ITK programs see it elsewhere than they should.

    header: of the scan beside which the file lies. On its voxels its forms, codes and unit stay as they are stored; on
    others both forms are moved alike.
    """
    nifti = nib.Nifti2Header() if max(shape) > _LONGEST_AXIS else nib.Nifti1Header()
    nifti.set_data_dtype(dtype)
    intent = 0 if header is None else header.intent
    if intent in _VECTORS and len(shape) == 4:
        nifti.set_data_shape((*shape[:3], 1, shape[3]))
    else:
        nifti.set_data_shape(shape)
        intent = 0 if intent in _VECTORS else intent
    nifti["intent_code"] = intent
    nifti.set_xyzt_units("mm")
    if header is None or header.nifti is None:
        place = affine if header is None else scaled(affine, 1 / header.scale)
        _set_one_affine(nifti, place, shape)
        # Who made a sheared affine without a file knows; who read one may not.
        return nifti, None if header is None and max(shape) <= _LONGEST_AXIS else _note(nifti, place, shape)
    moved = header.voxel_map(affine)
    seen = itk_form(header.nifti)
    same = grid_shift(np.eye(4), moved, shape)[0] < ROUNDING_VOXELS
    if same and (shape[:3] == header.shape[:3] or max(header.nifti["sform_code"], header.nifti["qform_code"]) > 0):
        for name in _PLACE:
            nifti[name] = header.nifti[name]
        nifti["pixdim"][:4] = header.nifti["pixdim"][:4]
    else:
        nifti["xyzt_units"] = header.nifti["xyzt_units"]
        _set_moved(nifti, header, moved, shape)
    return nifti, _note(nifti, None if seen is None else seen @ moved, shape)


def itk_place(affine: np.ndarray, header: Header | None) -> np.ndarray:
    """Give the affine for a format that only ITK programs read: where they see the scan of this header."""
    if header is None:
        return affine
    if header.nifti is None:
        return scaled(affine, 1 / header.scale)
    seen = itk_form(header.nifti)
    # A scan that they refuse is shown at least where other programs have it.
    place = header.file_affine if seen is None else seen
    return scaled(place, mm_per_unit(header.nifti)) @ header.voxel_map(affine)


def _set_one_affine(nifti: nib.Nifti1Header, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """The same place in both forms, in the sform alone where the axes are too far from right angles for a qform."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    nifti["pixdim"][1:4] = spacing
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1, strip_shears=True)
    if not grid_shift(affine, nifti.get_qform(), shape)[0] <= _QFORM_MISS:
        nifti.set_qform(None, code=0)
        nifti["pixdim"][1:4] = spacing


def _set_moved(nifti: nib.Nifti1Header, header: Header, moved: np.ndarray, shape: tuple[int, ...]) -> None:
    """The scan's two forms for voxels of another grid. moved: (4, 4), from these voxels to the scan's."""
    assert header.nifti is not None
    sform, qform = header.file_affine @ moved, qform_of(header.nifti)
    codes = int(header.nifti["sform_code"]), int(header.nifti["qform_code"])
    if max(codes) <= 0:
        # Without a form nibabel and ITK begin at two places; of these codes each program takes its own.
        codes, qform = (2, 1), itk_form(header.nifti)
    nifti["pixdim"][1:4] = np.linalg.norm(np.diag(pixdim_of(header.nifti)) @ moved[:3, :3], axis=0)
    if qform is not None:
        nifti.set_qform(qform @ moved, code=1, strip_shears=True)
        nifti["qform_code"] = codes[1]
        if grid_shift(qform @ moved, nifti.get_qform(), shape)[0] > _QFORM_MISS:
            _set_one_affine(nifti, sform, shape)
            return
    if codes[0] > 0:
        nifti.set_sform(sform, code=1)
        nifti["sform_code"] = codes[0]


def _note(nifti: nib.Nifti1Header, wanted: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    """What is to be said where ITK does not see a file at (4, 4) `wanted`, or not at all."""
    seen = itk_form(nifti)
    voxels, mm = (0.0, 0.0) if wanted is None or seen is None else grid_shift(wanted, seen, shape)
    if isinstance(nifti, nib.Nifti2Header):
        what = f"do not read NIfTI-2, which an axis of more than {_LONGEST_AXIS} voxels needs"
    elif seen is None:
        what = "refuse it, as its axes are not at right angles and NIfTI cannot say that to them"
    elif voxels > _NOTED:
        mm *= mm_per_unit(nifti)
        what = f"show it up to {mm:.3g} mm ({voxels:.2g} voxels) off, as NIfTI cannot say its place to them and to "
        what += "others alike"
    else:
        return None
    return f"ITK programs (3D Slicer, ITK-SNAP, SimpleITK) {what}; .nrrd or .mha would lie on the scan there too"
