"""Any callable over windows of a volume, as MONAI's sliding_window_inference, by the engine of tiled.py."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mambahome_jax.errors import ConfigError
from mambahome_jax.inference.targets import Whole, mean_of_tile
from mambahome_jax.inference.tiled import (
    Mode,
    PaddingMode,
    Predict,
    Progress,
    Replica,
    WindowSettings,
    device_budget,
    predict_tiled,
    window_size,
)
from mambahome_jax.support.keywords import checked


@checked
def sliding_window(
    predict: Predict,
    image: np.ndarray | jax.Array,
    roi_size: int | Sequence[int],
    overlap: float | Sequence[float] = 0.5,
    mode: Mode = "gaussian",
    sw_batch_size: int = 4,
    padding_mode: PaddingMode = "edge",
    sigma_scale: float | Sequence[float] = 0.125,
    *,
    padding_value: float = 0.0,
    accumulate_on: Literal["device", "host"] | None = None,
    progress: Progress | None = None,
) -> jax.Array | np.ndarray:
    """Predict a volume window by window and blend: sum(weight * prediction) / sum(weight).

    Args:
        predict: (sw_batch_size, *roi, in) -> (sw_batch_size, *roi, classes), any callable on arrays. Each call has the
            same shape, the last one filled up with repeated windows, so that a jitted function compiles once.
        image: (D, H, W, in), floating point; integers become float32.
        roi_size: window in voxels; an entry <= 0 takes the whole axis. A shorter axis is padded, floor(missing / 2)
            before, and cut again: "edge" values, or the constant `padding_value`.
        overlap: share of a window that the next one covers, in [0, 1), also one an axis.
        mode: weights "gaussian" (standard deviation sigma_scale * roi, also one an axis) or "constant".
        accumulate_on: "device"; "host" for a result that does not fit there; None chooses by the free memory.
        progress: called with (windows done, windows in all).

    Returns:
        (D, H, W, classes) in float32, or float64 where `predict` gives that: a jax.Array, on the host an ndarray.

    Raises:
        ConfigError: settings or shapes that do not fit.
    """
    if not isinstance(image, np.ndarray | jax.Array):
        raise ConfigError(f"image is a {type(image).__name__}; expected an array (D, H, W, channels)")
    if image.ndim != 4 or 0 in image.shape:
        raise ConfigError(f"image has shape {tuple(image.shape)}; expected (D, H, W, channels), none of them 0")
    if sw_batch_size < 1:
        raise ConfigError(f"sw_batch_size is {sw_batch_size}; expected 1 or more")
    voxels, shape = np.asarray(image), image.shape[:3]
    roi = window_size(shape, roi_size)
    device_bytes = {"device": np.inf, "host": 0.0, None: None}[accumulate_on]
    settings = WindowSettings(roi, overlap, mode, padding_mode, sw_batch_size, device_bytes, sigma_scale, padding_value)
    target = Whole(shape, mean_of_tile)
    slab = lambda axis, start, stop: np.moveaxis(np.moveaxis(voxels, axis, 0)[start:stop], 0, axis)  # noqa: E731
    predict_tiled([[Replica(None, predict)]], slab, shape, settings, [target], progress)
    assert target.result is not None
    budget = device_budget(jax.devices()[0]) if device_bytes is None else device_bytes
    return jnp.asarray(target.result) if target.result.nbytes <= budget else target.result
