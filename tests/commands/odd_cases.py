"""Ways to spoil case b of images/ and labels/ with the cases a to f of `scans`, or its dataset.json."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.commands.scans import AFFINE, scan, write

LABELS = {"1": "liver", "2": "spleen"}


def damaged_files(folder: Path) -> None:
    paths = [folder / f"images/{name}.nii.gz" for name in "abcdef"]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(b"no scan at all")
    paths[2].write_bytes(gzip.compress(b"short"))
    content = bytearray(gzip.decompress(paths[3].read_bytes()))
    content[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
    paths[3].write_bytes(gzip.compress(bytes(content)))
    content = bytearray(paths[4].read_bytes())
    content[len(content) // 2] ^= 255
    paths[4].write_bytes(bytes(content))
    content = bytearray(gzip.decompress(paths[5].read_bytes()))
    content[70:72] = np.array([9999], "<i2").tobytes()
    paths[5].write_bytes(gzip.compress(bytes(content)))


def constant(folder: Path) -> None:
    write(folder / "images/b.nii.gz", np.full((12, 16, 8), 7, np.int16))


def no_air(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "channels": ["CT"]}))
    write(folder / "images/b.nii.gz", scan(seed=1)[0] + np.int16(1024))


def empty_label(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", np.zeros((12, 16, 8), np.uint8))


def no_background(folder: Path) -> None:
    write(folder / "labels/b.nii.gz", np.maximum(scan()[1], 1))


def no_label(folder: Path) -> None:
    (folder / "labels/b.nii.gz").unlink()


def same_voxels(folder: Path) -> None:
    """Case a once more, uncompressed, as floats and with another affine."""
    (folder / "images/b.nii.gz").unlink()
    image = scan(seed=0)[0].astype(np.float32)
    write(folder / "images/b.nii", image)


def sheared(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 1] = 0.1
    for kind, array in zip(("images", "labels"), scan(seed=1), strict=True):
        image = nib.Nifti1Image(array, affine)
        image.set_qform(None, code=0)
        nib.save(image, folder / f"{kind}/b.nii.gz")


def forms_disagree(folder: Path) -> None:
    image = nib.Nifti1Image(scan(seed=1)[0], AFFINE)
    moved = AFFINE.copy()
    moved[2, 3] += 6
    image.set_sform(AFFINE, code=1)
    image.set_qform(moved, code=1)
    nib.save(image, folder / "images/b.nii.gz")


def pixdim_disagrees(folder: Path) -> None:
    image = nib.Nifti1Image(scan(seed=1)[0], AFFINE)
    image.set_qform(None, code=0)
    image.header["pixdim"][1:4] = 1
    nib.save(image, folder / "images/b.nii.gz")


def no_form(folder: Path) -> None:
    for kind, array in zip(("images", "labels"), scan(seed=1), strict=True):
        image = nib.Nifti1Image(array, None)
        image.header["pixdim"][1:4] = 2, 1, 3
        nib.save(image, folder / f"{kind}/b.nii.gz")
    (folder / "labels/b.nii.gz").unlink()


def coarse(folder: Path) -> None:
    affine = AFFINE @ np.diag([1, 1, 8, 1])
    for kind, array in zip(("images", "labels"), scan(seed=1), strict=True):
        write(folder / f"{kind}/b.nii.gz", array, affine)


def long(folder: Path) -> None:
    for kind, array in zip(("images", "labels"), scan((12, 16, 40), seed=1), strict=True):
        write(folder / f"{kind}/b.nii.gz", array)


def structure_in_no_case(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS | {"7": "pancreas"}}))


def oblique(folder: Path) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE
    for kind, array in zip(("images", "labels"), scan(seed=1), strict=True):
        write(folder / f"{kind}/b.nii.gz", array, affine)


def mirrored(folder: Path) -> None:
    for kind, array in zip(("images", "labels"), scan(seed=1), strict=True):
        write(folder / f"{kind}/b.nii.gz", array[::-1], AFFINE @ np.diag([-1, 1, 1, 1]))


def little_off(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] += 0.05
    write(folder / "labels/b.nii.gz", scan(seed=1)[1], affine)
