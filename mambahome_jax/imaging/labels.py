"""Label maps as arrays: their values replaced, and signs that one is an image."""

from collections.abc import Mapping

import numpy as np

# Of a label map, neighbours within structures nearly always agree; of an image with noise, a tenth or fewer do.
_FEWEST_VALUES, _FEWEST_EQUAL = 20, 0.5


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


def same_voxels(label: np.ndarray, image: np.ndarray, values: int = 0) -> bool:
    """Whether a label map (D0, D1, D2) equals a channel of an image (D0, D1, D2[, C]), voxel by voxel.

    values: how many the label map has; of many, an image whose fractions were cut off or rounded is equal too.
    """
    channels = image if image.ndim == 4 else image[..., None]
    if channels.shape[:3] != label.shape:
        return False
    equal = np.array_equal if values <= _FEWEST_VALUES else _equal_but_for_fractions
    # Plane by plane: the first tells of nearly every pair.
    return any(
        all(equal(label[:, :, k], channels[:, :, k, c]) for k in range(label.shape[2]))
        for c in range(channels.shape[3])
    )


def _equal_but_for_fractions(label: np.ndarray, image: np.ndarray) -> bool:
    return bool((np.abs(label - image.astype(np.float32)) < 1).all())


def resembles_image(array: np.ndarray, values: int) -> bool:
    """Whether a label map (D0, D1, D2) of so many `values` is rather an image: neighbours in structures differ."""
    if values <= _FEWEST_VALUES:
        return False
    pairs = equal = 0
    for k in range(array.shape[2]):
        plane = array[:, :, k]
        labelled = (plane[1:] > 0) & (plane[:-1] > 0)
        pairs += int(np.count_nonzero(labelled))
        equal += int(np.count_nonzero(labelled & (plane[1:] == plane[:-1])))
    return equal < _FEWEST_EQUAL * pairs
