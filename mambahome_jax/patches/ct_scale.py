"""The numbers by which a dataset normalises its CT, from the labelled voxels of its cases."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambahome_jax.config import CtScale
from mambahome_jax.errors import DatasetError
from mambahome_jax.patches.store import INTENSITIES
from mambahome_jax.support.files import NPZ_ERRORS

PERCENTILES = (0.5, 99.5)

_MOST = 10_000_000  # values at once, all cases together: 40 MB


def ct_scale(root: Path, cases: Sequence[str]) -> CtScale | None:
    """Percentiles 0.5 and 99.5, mean and standard deviation of the labelled voxels of CT cases in a patch store.

    root: the store; cases: ids. Every case counts the same, whatever its size. None where nothing is labelled.
    Raises DatasetError: a case without its sample, or with a damaged one.
    """
    parts = []
    for case in cases:
        file = root / case / INTENSITIES
        try:
            with file.open("rb") as opened:
                values = np.load(opened, allow_pickle=False)
        except NPZ_ERRORS as error:
            action = "Run preprocess.py again with --overwrite."
            raise DatasetError(f"cannot be read ({error})", case=case, file=file, action=action) from error
        step = max(-(-values.size * len(cases) // _MOST), 1)
        parts.append(values[::step])
    pooled = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    if not len(pooled):
        return None
    low, high = np.percentile(pooled, PERCENTILES, axis=0)
    mean, std = pooled.mean(axis=0, dtype=np.float64), pooled.std(axis=0, dtype=np.float64)
    # What float32 cannot resolve is one value, and would be divided by nearly nothing.
    std = np.where(std > 1e-7 * np.abs(mean), std, 1.0)
    low, high, mean, std = (tuple(float(value) for value in column) for column in (low, high, mean, std))
    return CtScale(low, high, mean, std)
