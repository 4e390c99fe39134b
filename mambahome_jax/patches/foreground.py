"""Where the labelled voxels of a case are, and samples of their values."""

import numpy as np

MAX_POSITIONS = 20_000
SAMPLE = 10_000


def foreground_positions(label: np.ndarray, limit: int = MAX_POSITIONS) -> dict[int, np.ndarray]:
    """Up to `limit` voxel positions of each class but the background, int32 (n, 3), in C order.

    label (D, H, W) uint8. Of a larger class an even sample without replacement, always the same for the same label.
    """
    flat = label.ravel()
    where = np.flatnonzero(flat)
    # One stable sort by value instead of a pass over the volume for each class.
    where = where[np.argsort(flat[where], kind="stable")]
    values, starts = np.unique(flat[where], return_index=True)
    rng = np.random.default_rng(0)
    positions = {}
    for value, members in zip(values, np.split(where, starts[1:]), strict=False):
        if len(members) > limit:
            members = np.sort(rng.choice(members, limit, replace=False))
        positions[int(value)] = np.stack(np.unravel_index(members, label.shape), axis=1).astype(np.int32)
    return positions


def foreground_sample(image: np.ndarray, label: np.ndarray, size: int = SAMPLE) -> np.ndarray:
    """Values of labelled voxels, (size, C) float32, evenly spread over them; (0, C) where nothing is labelled.

    image (D, H, W, C); label (D, H, W). Always as many, some repeated where there are fewer: each case counts the same.
    """
    where = np.flatnonzero(label.ravel())
    chosen = where[np.linspace(0, len(where), size, endpoint=False).astype(np.int64)] if len(where) else where
    return image.reshape(-1, image.shape[-1])[chosen].astype(np.float32)
