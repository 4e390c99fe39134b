"""Where a file that is written says that its voxels lie: with a scan's header, where every program sees that scan."""

import nibabel as nib
import numpy as np

from mambahome_jax.imaging.header import (
    Header,
    grid_shift,
    itk_form,
    mm_per_unit,
    pixdim_of,
    qform_of,
    scaled,
)

_NOTED = 0.01  # voxels by which an ITK program may show a file elsewhere without a word
_USABLE = 0.1  # voxels by which a qform may differ from the sform, which alone can say shear
_SAME = 1e-3  # voxels below which a volume counts as on the grid of its header
_LONGEST_AXIS = 32767  # voxels that NIfTI-1 can say
_PLACE = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"),
)
_VECTORS = (1006, 1007)  # intent codes of values along the fifth axis


def nifti_header(
    shape: tuple[int, ...], dtype: np.dtype, affine: np.ndarray, header: Header | None
) -> tuple[nib.Nifti1Header, str | None]:
    """Header of a NIfTI file, and a note where ITK programs see it elsewhere than they should.

    shape: (D0, D1, D2[, C]). affine: (4, 4), voxel to RAS mm. header: of the scan beside which the file lies. On that
    scan's voxels its forms, codes and unit stay as they are stored; on others both forms are moved alike.
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
    same = grid_shift(np.eye(4), moved, shape)[0] < _SAME
    if same and (shape[:3] == header.shape[:3] or max(header.nifti["sform_code"], header.nifti["qform_code"]) > 0):
        for name in _PLACE:
            nifti[name] = header.nifti[name]
        nifti["pixdim"][:4] = header.nifti["pixdim"][:4]
    else:
        nifti["xyzt_units"] = header.nifti["xyzt_units"]
        _set_moved(nifti, header, moved, shape)
    return nifti, _note(nifti, None if seen is None else seen @ moved, shape)


def itk_place(affine: np.ndarray, header: Header | None) -> np.ndarray:
    """(4, 4), voxel to RAS mm, for a format that only ITK programs read: where they see the scan of this header.

    affine: (4, 4) of the volume that is written.
    """
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
    if not grid_shift(affine, nifti.get_qform(), shape)[0] <= _USABLE:
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
        if grid_shift(qform @ moved, nifti.get_qform(), shape)[0] > _USABLE:
            _set_one_affine(nifti, sform, shape)
            return
    if codes[0] > 0:
        nifti.set_sform(sform, code=1)
        nifti["sform_code"] = codes[0]


def _note(nifti: nib.Nifti1Header, wanted: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    """What is to be said where ITK does not see a file at (4, 4) `wanted`, or not at all."""
    if isinstance(nifti, nib.Nifti2Header):
        return (
            "ITK programs (3D Slicer, ITK-SNAP, SimpleITK) do not read NIfTI-2, which an axis of more than "
            f"{_LONGEST_AXIS} voxels needs; .nrrd or .mha would lie on the scan there too"
        )
    seen = itk_form(nifti)
    if seen is None:
        return (
            "ITK programs (3D Slicer, ITK-SNAP, SimpleITK) refuse it, as its axes are not at right angles and NIfTI "
            "cannot say that to them; .nrrd or .mha would lie on the scan there too"
        )
    voxels, mm = (0.0, 0.0) if wanted is None else grid_shift(wanted, seen, shape)
    if voxels <= _NOTED:
        return None
    mm *= mm_per_unit(nifti)
    return (
        f"ITK programs (3D Slicer, ITK-SNAP, SimpleITK) show it up to {mm:.3g} mm ({voxels:.2g} voxels) off, as NIfTI "
        "cannot say its place to them and to others alike; .nrrd or .mha would lie on the scan there too"
    )
