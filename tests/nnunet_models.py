"""Trained model folders of nnU-Net in miniature, with its own label maps of their scans."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax.imaging.volume import Volume, read_volume
from tests.conftest import FULL, REDUCED


def miniature(name):
    """Folder of a miniature: a model folder, scans/ and expected.npz. Skips where only the full set has it."""
    for goldens in (FULL, REDUCED):
        if (home := goldens / "baselines" / "miniature" / name).exists():
            return home
    pytest.skip(f"{name} is only in the full set of goldens, ../shared/parity")


def model_folder(home):
    """The model folder in a miniature."""
    return next(path for path in home.iterdir() if "__" in path.name)


def scan(home, case):
    """Both channels of a scan; skips where it is not in the part of the goldens that is kept here."""
    files = [home / "scans" / f"{case}_{channel:04}.nii.gz" for channel in (0, 1)]
    if not files[0].exists():
        pytest.skip(f"{home.name} {case} is only in the full set of goldens, ../shared/parity")
    first, second = map(read_volume, files)
    return Volume(np.stack([first.array, second.array], axis=-1), first.affine, first.header)


def expected(home, case, mode):
    """nnU-Net's label map with its sums in float32, axes as in the file."""
    with np.load(home / "expected.npz") as golden:
        return golden[f"{case}/{mode}/f32/label"].transpose(2, 1, 0)


def copied(tmp_path, **changes):
    """A copy of the aniso model; changes: name of a JSON file -> what is done to its content."""
    source = model_folder(miniature("aniso"))
    folder = Path(shutil.copytree(source, tmp_path / source.name))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        path.chmod(0o644)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return folder
