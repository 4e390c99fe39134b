"""Small scans on disk for the tests of preprocess."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from mambahome_jax.flags import PreprocessConfig

# Axes run L, P, S; 2 x 1 x 3 mm.
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -1, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scan(shape=(12, 16, 8), seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 in the manner of CT, label with 1 and 2."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:9, 2:5], label[7:10, 8:14, 4:7] = 1, 2
    image = label.astype(int) * 500 - 1000 + rng.integers(0, 50, shape) + 900 * (label > 0)
    return image.astype(np.int16), label


def preprocess_config(folder: Path) -> PreprocessConfig:
    """Settings for folder/in, which gets images/ and labels/ with the cases a, b, c."""
    for seed, name in enumerate("abc"):
        image, label = scan(seed=seed)
        write(folder / f"in/images/{name}.nii.gz", image)
        write(folder / f"in/labels/{name}.nii.gz", label)
    return PreprocessConfig(folder / "in", folder / "out", spacing=(1, 1, 3), num_workers=1)


def description(config: PreprocessConfig) -> dict:
    return json.loads((config.output_path / "dataset.json").read_text())


def reasons(config: PreprocessConfig) -> dict[str, str]:
    return {entry["id"]: entry["reason"] for entry in description(config)["skipped"]}
