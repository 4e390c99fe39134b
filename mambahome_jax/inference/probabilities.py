"""Softmax probabilities of all classes, on the network's own grid, as float16 in an .npz.

On that grid nothing is interpolated, and it is mostly smaller than the scan's; its affine is in the file. NIfTI has no
float16.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mambahome_jax.support.files import atomic_write

ENTRIES = ("probabilities", "affine", "labels")


def write_probabilities(path: Path, values: np.ndarray, affine: np.ndarray, names: Mapping[int, str]) -> None:
    """Write an .npz of `probabilities` (D, H, W, classes) and `affine` (4, 4), voxel to RAS mm, whole or not at all.

    names: of the label values; `labels` in the file is the JSON text {"0": "background", "1": name, ...}.
    Raises OutputError: it cannot be written.
    """
    labels = {str(value): names.get(value, f"label_{value}") for value in range(1, values.shape[-1])}
    text = np.array(json.dumps({"0": "background"} | labels))
    # Level 1, as most of it is ones and zeros.
    with (
        atomic_write(path, "folder") as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name, array in zip(ENTRIES, (values, affine, text), strict=True):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def whole_probabilities(path: Path) -> bool:
    """Whether a file that `write_probabilities` made is there and every byte of it as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in ENTRIES} <= set(archive.namelist()) and archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError):
        return False
