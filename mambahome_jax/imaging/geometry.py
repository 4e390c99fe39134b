"""Orientation, grids and resampling of volumes, and the way back. Everything follows the affine, never pixdim.

Grids and linear sampling agree with MONAI's Spacing (defaults, padding "border") and with its inverse, cubic splines
on these grids with nnU-Net's resampling of images (nnunetv2 2.8.1, preprocessing/resampling/default_resampling.py).
Where the two grids' axes are parallel, which is nearly always so, sampling is done one axis after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel import orientations
from scipy import ndimage

from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.header import ROUNDING_VOXELS, grid_shift
from mambahome_jax.imaging.volume import Volume, require_volume
from mambahome_jax.support.keywords import checked

Order = Literal["linear", "cubic", "nearest"]
Box = tuple[slice, slice, slice]
Limits = tuple[np.ndarray, np.ndarray]  # lowest and highest values, to broadcast against a volume

# Voxels by which a label map may lie off its image, and a prediction off its reference: affines are often text.
LABEL_VOXELS, SCORE_VOXELS = 0.1, 0.05
_SAME = 1e-3  # spacings and affines closer than this count as equal (MONAI's AFFINE_TOL)
_CORNER = 1e-8  # a corner of the old grid counts as the new grid's first voxel up to here
_FINER = 512  # eight times as fine along each axis
_FEW = 1 << 22  # voxels that any scan may become
_COARSER = 100  # voxels that become one where next to nothing of a scan is left
_WIDE = 16  # voxels of an axis that the network works on at least
_COARSE = 3  # times as long as the finest are voxels of an axis along which cubic splines do not interpolate
# Voxels of a cubic spline that are computed together, and beyond them those that still weigh: 0.27^16, below 1e-9.
_TOGETHER, SPLINE_REACH = 32, 16
_SLAB_BYTES = 32 << 20
_CUBIC_VALUES = 1 << 20  # in flight, which the cache keeps
_PARALLEL = 1e-4  # voxels by which sampling axis by axis may miss a position


def orientation_of(affine: np.ndarray) -> str:
    """Direction in which each voxel axis runs, as three letters of R L A P S I: "RAS", "LPS", "PSR" ..."""
    rows, columns = np.nonzero(affine[:3, :3])
    if rows.tolist() == [0, 1, 2] and len(set(columns.tolist())) == 3:
        # Along the patient's axes there is nothing to weigh, and thousands of scans are soon done.
        letters = np.where(affine[rows, columns] < 0, list("LPI"), list("RAS"))
        return "".join(letters[np.argsort(columns)])
    return "".join(orientations.ornt2axcodes(orientations.io_orientation(affine)))


def axis_order(orientation: str) -> list[int]:
    """The axes of an array in the order R-L, A-P, S-I, of an orientation such as "PSR"."""
    return [next(i for i, letter in enumerate(orientation) if letter in pair) for pair in ("RL", "AP", "SI")]


@checked
def reorient(volume: Volume, orientation: str) -> Volume:
    """Permute and flip the spatial axes so that they run along `orientation` ("LPS", "RAS" ...), without interpolation.

    The world stays RAS+. The array is a view. Raises ConfigError for letters that name no orientation.
    """
    require_volume("volume", volume)
    codes = str(orientation).upper()
    if len(codes) != 3 or not all(set(pair) & set(codes) for pair in ("RL", "AP", "SI")):
        raise ConfigError(f"orientation {orientation!r}; expected one letter each of R|L, A|P and S|I, such as RAS")
    change = orientations.ornt_transform(
        orientations.io_orientation(volume.affine), orientations.axcodes2ornt(tuple(codes))
    )
    return _turned(volume, change)


def _turned(volume: Volume, change: np.ndarray) -> Volume:
    """Permute and flip the axes as nibabel's (3, 2) `change` says; the array is a view."""
    affine = volume.affine @ orientations.inv_ornt_aff(change, volume.shape)
    return Volume(orientations.apply_orientation(volume.array, change), affine, volume.header)


def resampled_grid(
    affine: np.ndarray, shape: Sequence[int], spacing: Sequence[float]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine and shape that MONAI's Spacing gives a grid at a new spacing; the old ones where nearly nothing changes.

    spacing: mm an axis; 0 or below keeps the axis as it is. Shear between the axes is removed.
    Raises ConfigError: no three finite numbers. DatasetError: a grid so much finer that no scan can be meant, as of a
    header with a wrong unit.
    """
    try:
        target = np.asarray(spacing, dtype=np.float64)
    except (TypeError, ValueError):
        target = np.array(np.nan)
    if target.shape != (3,) or not np.isfinite(target).all():
        raise ConfigError(f"spacing {spacing}; expected three numbers in mm")
    axes, size = affine[:3, :3], np.asarray(shape[:3], dtype=np.float64)
    present = np.linalg.norm(axes, axis=0)
    target = np.where((target <= 0) | (np.abs(target - present) <= _SAME), present, target)
    upper = np.linalg.cholesky(axes.T @ axes).T
    new_axes = axes @ np.linalg.inv(upper) @ np.diag(target)

    to_new = np.linalg.inv(new_axes) @ axes
    corners = np.stack(np.meshgrid(*[(0.0, n - 1) for n in size], indexing="ij"), axis=-1).reshape(8, 3)
    new_corners = corners @ to_new.T
    low, high = new_corners.min(axis=0), new_corners.max(axis=0)
    new_size = np.round(high - low + 1)
    require_feasible(size, new_size, present, target)
    first = np.flatnonzero((np.abs(low - new_corners) <= _CORNER).all(axis=1))
    if first.size:
        origin = axes @ corners[first[0]] + affine[:3, 3]
    else:
        # Half the size, not the middle between first and last voxel: MONAI's rule, half a voxel of each grid off.
        origin = axes @ (size / 2) + affine[:3, 3] - new_axes @ (new_size / 2)
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = new_axes, origin
    new_shape = (int(new_size[0]), int(new_size[1]), int(new_size[2]))
    if _unmoved(affine, shape, result, new_shape):
        return affine, (shape[0], shape[1], shape[2])
    return result, new_shape


def require_feasible(size: np.ndarray, new_size: np.ndarray, spacing: np.ndarray, target: np.ndarray) -> None:
    """Raise DatasetError where a scan of `size` voxels becomes so many more that none can be meant.

    All (3,); spacing, target: mm of the voxels before and after.
    """
    # A needle of a million voxels is a file's worth of memory, but days of windows.
    usual = new_size.prod() <= max(_FINER * size.prod(), _FEW)
    if not usual or np.maximum(new_size, _WIDE).prod() > max(_FINER * np.maximum(size, _WIDE).prod(), _FEW):
        extent, voxels = (" x ".join(f"{value:.4g}" for value in values) for values in (spacing * size, new_size))
        fault = f"{extent} mm, which are {voxels} voxels of {' x '.join(f'{mm:.4g}' for mm in target)} mm"
        action = "Mend the spacing in its header, or choose a coarser --spacing."
        raise DatasetError(fault, expected=f"at most {_FINER} times as many as it has", action=action)


def coarse_remark(shape: Sequence[int], new_shape: Sequence[int]) -> str | None:
    """What to say of a scan of which resampling leaves next to nothing, None where enough is left."""
    before, after = (math.prod(voxels[:3]) for voxels in (shape, new_shape))
    if max(new_shape[:3]) >= _WIDE or after * _COARSER > before:
        return None
    voxels, left = (" x ".join(map(str, size[:3])) for size in (shape, new_shape))
    remedy = "--spacing_scale 10 or 1000 multiplies them, a finer --spacing keeps more"
    return f"of {voxels} voxels resampling leaves {left}; are the lengths in its header too small? {remedy}"


@checked
def resample(volume: Volume, spacing: Sequence[float], order: Order = "linear") -> Volume:
    """Resample to a spacing in mm, as MONAI's Spacingd; a volume that has it already comes back as it is.

    Args:
        spacing: one value an axis; 0 or below keeps the volume's.
        order: "linear" gives float32; "cubic" too, by splines whose values are cut to those of the volume, but the
            nearest voxel along an axis of voxels more than 3 times as long as the finest, and then cut slice by slice;
            "nearest" keeps the dtype, for label maps. Outside the old grid the edge goes on.

    Raises:
        ConfigError, DatasetError: as `resampled_grid`.
    """
    require_volume("volume", volume)
    affine, shape = resampled_grid(volume.affine, volume.shape, spacing)
    if affine is volume.affine:
        return volume
    return resample_to(volume, affine, shape, order)


@checked
def resample_to(
    volume: Volume,
    affine: np.ndarray,
    shape: Sequence[int],
    order: Order = "linear",
    *,
    box: Box | None = None,
    before: Callable[[np.ndarray], np.ndarray] | None = None,
    limits: Limits | None = None,
) -> Volume:
    """Sample a volume at the voxels of another grid (`affine` (4, 4), `shape` (D0, D1, D2)), of any orientation.

    A trailing channel axis is kept. Undoes `reorient` and `resample`: give it the affine and shape of the file.

    Args:
        order: as of `resample`.
        box: the part of the new grid to sample, start and stop an axis; its values are those that the whole has there,
            with "cubic" up to float32's rounding.
        before: applied to the voxels that are used, before they are sampled; any function of each voxel by itself.
        limits: `cubic_limits` of the volume after `before`, for who samples many boxes; None measures them.
    """
    require_volume("volume", volume)
    if np.shape(affine) != (4, 4) or len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"affine {np.shape(affine)}, shape {tuple(shape)}; expected (4, 4) and three sizes")
    array = np.asarray(volume.array)
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    box = box if box is not None else (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    before = before if before is not None else np.asarray
    first = np.array([part.start for part in box])
    part_affine = affine.copy()
    part_affine[:3, 3] += affine[:3, :3] @ first
    axes = _axis_positions(volume.affine, volume.shape, affine, shape)
    if order == "cubic" and limits is None:
        limits = cubic_limits(replace(volume, array=before(array)), affine)
    if axes is None:
        to_old = np.linalg.inv(volume.affine) @ affine
        to_old[:3, 3] += to_old[:3, :3] @ first
        part = (box[0].stop - box[0].start, box[1].stop - box[1].start, box[2].stop - box[2].start)
        sampled = _sample_anywhere(before(array), to_old, part, order)
        if limits is not None:
            sampled = sampled.clip(limits[0].min(axis=(0, 1, 2)), limits[1].max(axis=(0, 1, 2)))
        return Volume(sampled, part_affine, volume.header)
    source, every = axes
    array = array.transpose(*source, *range(3, array.ndim))
    reach = SPLINE_REACH if order == "cubic" else 0
    positions, used = [], []
    for axis, old_size in enumerate(array.shape[:3]):
        inside = every[axis][box[axis]]
        low, high = max(int(inside.min()) - reach, 0), int(np.ceil(inside.max())) + reach
        used.append(slice(low, min(high + 1, old_size)))
        positions.append(inside - low)
    # The one that shrinks most first: no array on the way exceeds both input and output. Of the whole grids, so that
    # every box of them is computed alike.
    turns = sorted(range(3), key=lambda axis: shape[axis] / array.shape[axis])
    orders: list[Order] = [order] * 3
    coarse = _coarse_axis(volume.affine, affine) if order == "cubic" else None
    if coarse is not None:
        orders[source.index(coarse)] = "nearest"
    sampled = sample_by_axis(before(array[tuple(used)]), positions, turns, orders)
    if limits is not None and not np.may_share_memory(sampled, array):
        least, most = (each.transpose(*source, *range(3, array.ndim)) for each in limits)
        if coarse is not None:
            along = source.index(coarse)
            index = np.rint(positions[along]).astype(np.intp) + used[along].start
            least, most = least.take(index, axis=along), most.take(index, axis=along)
        np.clip(sampled, least, most, out=sampled)
    return Volume(sampled, part_affine, volume.header)


def cubic_limits(volume: Volume, affine: np.ndarray) -> Limits:
    """Lowest and highest values to which cubic splines onto the grid of `affine` are cut, of each channel.

    Of each slice by itself where there is an axis along which they do not interpolate, as nnU-Net does.
    """
    coarse, array = _coarse_axis(volume.affine, affine), np.asarray(volume.array)
    axes = tuple(axis for axis in range(3) if axis != coarse)
    low, high = (end(array, axis=axes, keepdims=True).astype(np.float32) for end in (np.min, np.max))
    return low, high


def _coarse_axis(affine: np.ndarray, target_affine: np.ndarray) -> int | None:
    """The axis of a grid along which cubic splines do not interpolate onto another, None where they do along all.

    Of voxels more than 3 times as long as the finest, in this grid or else in the target, if no other is as long.
    """
    axes, target_axes = affine[:3, :3], target_affine[:3, :3]
    along = np.abs(np.linalg.inv(axes) @ target_axes).argmax(axis=0)
    for millimetres in (np.linalg.norm(axes, axis=0), np.linalg.norm(target_axes, axis=0)[np.argsort(along)]):
        longest = millimetres.max()
        if longest > _COARSE * (1 + _SAME) * millimetres.min():
            coarse = np.flatnonzero(millimetres > (1 - _SAME) * longest)
            return int(coarse[0]) if len(coarse) == 1 else None
    return None


def row_slabs(shape: Sequence[int]) -> Iterator[slice]:
    """The first axis of an array in parts that are small as float32 beside a scan."""
    height = max(_SLAB_BYTES // (4 * math.prod(shape[1:])), 1)
    return (slice(first, min(first + height, shape[0])) for first in range(0, shape[0], height))


def positions_on(
    affine: np.ndarray, shape: Sequence[int], target_affine: np.ndarray, target_shape: Sequence[int]
) -> list[np.ndarray] | None:
    """Find where the target's voxels lie along each axis of a grid, in voxels, ascending and within it.

    None where the axes of the two are turned, flipped or sheared against each other.
    """
    axes = _axis_positions(affine, shape, target_affine, target_shape)
    if axes is None or axes[0] != [0, 1, 2] or any(position[0] > position[-1] for position in axes[1]):
        return None
    return axes[1]


def shift_between(image: Volume, label: Volume) -> tuple[float, float]:
    """Measure how far apart two volumes of one shape lie in the program that sees them nearest: voxels and mm.

    A label map that was drawn where an ITK program shows a scan fits the scan's other form, not its affine.
    """
    if np.array_equal(image.affine, label.affine):
        return 0.0, 0.0
    pairs = [(grid, label.affine) for grid in image.grids] + [(image.affine, grid) for grid in label.grids]
    return min(grid_shift(one, other, image.shape) for one, other in pairs)


def same_grid(image: Volume, other: Volume, voxels: float = ROUNDING_VOXELS) -> bool:
    """Whether two volumes have one shape and lie no further apart than `voxels`."""
    return image.shape == other.shape and shift_between(image, other)[0] <= voxels


def on_grid_of(
    image: Volume,
    label: Volume,
    file: Path,
    action: str = "Bring the label map onto the grid of its image first.",
    *,
    voxels: float = LABEL_VOXELS,
    name: str = "image",
) -> Volume:
    """Give the label map with its axes in the order and direction of the image's, a view.

    file: of the label map. name: of what it should lie on. Raises DatasetError unless `same_grid` then.
    """
    if same_grid(image, label, voxels):
        return label
    change = orientations.io_orientation(np.linalg.inv(image.affine) @ label.affine)
    turned = label if np.isnan(change).any() else _turned(label, change)
    if same_grid(image, turned, voxels):
        return turned
    label = turned if turned.shape == image.shape else label
    if image.shape != label.shape:
        size, wanted = (" x ".join(map(str, volume.shape)) for volume in (label, image))
        fault, expected = f"grid of {size} voxels", f"{wanted} as in the {name}"
        raise DatasetError(fault, file=file, expected=expected, action=action)
    shift, largest = grid_shift(image.affine, label.affine, image.shape)
    fault = f"a grid that lies up to {largest:.3g} mm ({shift:.3g} voxels) off the {name}'s"
    raise DatasetError(fault, file=file, expected=f"at most {voxels} voxels", action=action)


def _unmoved(affine: np.ndarray, shape: Sequence[int], other: np.ndarray, other_shape: Sequence[int]) -> bool:
    if tuple(shape[:3]) != tuple(other_shape[:3]):
        return False
    close = np.allclose(affine, other, atol=_SAME)
    return bool(close or np.allclose(np.linalg.inv(affine) @ other, np.eye(4), atol=_SAME))


def _axis_positions(
    affine: np.ndarray, shape: Sequence[int], target_affine: np.ndarray, target_shape: Sequence[int]
) -> tuple[list[int], list[np.ndarray]] | None:
    """For each axis of the target the axis of a grid that it runs along, and where its voxels lie on that, in voxels
    within the grid; None where the two are turned or sheared to each other."""
    matrix, middle = np.linalg.inv(affine) @ target_affine, (np.array(target_shape[:3]) - 1) / 2
    source = [int(axis) for axis in np.abs(matrix[:3, :3]).argmax(axis=0)]
    if sorted(source) != [0, 1, 2]:
        return None
    matrix, sizes = matrix[source], [shape[axis] for axis in source]
    steps, rest = np.diag(matrix), matrix[:, :3] - np.diag(np.diag(matrix))
    if (np.abs(rest) @ middle).max() >= _PARALLEL:
        return None
    if _unmoved(affine[:, [*source, 3]], sizes, target_affine, target_shape):
        return source, [np.arange(size, dtype=np.float64) for size in sizes]
    # With the other two indices in the middle: what is left of them is smallest there.
    start = matrix[:, 3] + matrix[:, :3] @ middle - steps * middle
    # Rounding to 1e-9 voxel makes ties and unmoved axes exact, whatever the noise of the matrix product.
    return source, [
        np.clip(np.round(start[axis] + steps[axis] * np.arange(target_shape[axis]), 9), 0, sizes[axis] - 1)
        for axis in range(3)
    ]


def _sample_anywhere(array: np.ndarray, to_old: np.ndarray, shape: tuple[int, int, int], order: Order) -> np.ndarray:
    """All axes at once. Old and new axes are walked in the array's memory order, which is several times faster."""
    memory = sorted(range(3), key=lambda axis: -abs(array.strides[axis]))
    matrix, offset = to_old[memory, :3], to_old[memory, 3]
    walk = [int(axis) for axis in np.abs(matrix / np.linalg.norm(matrix, axis=0)).argmax(axis=1)]
    if sorted(walk) != [0, 1, 2]:
        walk = [0, 1, 2]
    dtype = array.dtype if order == "nearest" else np.dtype(np.float32)
    result = np.empty((*array.shape[3:], *(shape[axis] for axis in walk)), dtype)
    for channel in np.ndindex(array.shape[3:]):
        ndimage.affine_transform(
            array[(..., *channel)].transpose(memory),
            matrix[:, walk],
            offset,
            output=result[channel],
            output_shape=result.shape[-3:],
            order={"nearest": 0, "linear": 1, "cubic": 3}[order],
            mode="nearest",
        )
    back = [result.ndim - 3 + walk.index(axis) for axis in range(3)]
    return result.transpose(*back, *range(result.ndim - 3))


def sample_by_axis(array: np.ndarray, positions: list[np.ndarray], turns: list[int], orders: list[Order]) -> np.ndarray:
    """Sample an array (D, H, W[, C]) one axis after the other, in the order of `turns`, each by its own of `orders`.

    positions: of the new voxels along each axis, in voxels of the array; beyond it only "cubic" takes any.
    """
    memory = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    result = array.transpose(memory)
    for axis in turns:
        result = _sample_axis(result, memory.index(axis), positions[axis], orders[axis])
    if {*orders} != {"nearest"}:
        result = result.astype(np.float32, copy=False)
    return result.transpose(np.argsort(memory))


def _sample_axis(array: np.ndarray, axis: int, position: np.ndarray, order: Order) -> np.ndarray:
    """Sample along one axis of an array whose memory order is C, at float64 positions within it.

    Works in slabs along the outermost axis, which keeps what is in flight in the cache.
    """
    size = array.shape[axis]
    low = (np.rint(position) if order == "nearest" else np.floor(position)).astype(np.intp)
    weight = (position - low).astype(np.float32)
    if order == "nearest" or not weight.any():
        if np.array_equal(low, np.arange(size)):
            return array
        result = np.empty((*array.shape[:axis], len(low), *array.shape[axis + 1 :]), array.dtype)
        if axis == 0:
            for i, index in enumerate(low):
                result[i] = array[index]
        else:
            for slab, out in zip(array, result, strict=True):
                np.take(slab, low, axis=axis - 1, out=out, mode="clip")
        return result
    if order == "cubic":
        return _splines_along(array, axis, position)
    high = np.minimum(low + 1, size - 1)
    result = np.empty((*array.shape[:axis], len(low), *array.shape[axis + 1 :]), np.float32)
    if axis == 0:
        step = np.empty(array.shape[1:], np.float32)
        for i, out in enumerate(result):
            np.subtract(array[high[i]], array[low[i]], out=step, dtype=np.float32)
            np.multiply(step, weight[i], out=step)
            np.add(step, array[low[i]], out=out)
        return result
    weight = weight.reshape(-1, *[1] * (array.ndim - 1 - axis))
    step = np.empty(result.shape[1:], np.float32)
    for slab, out in zip(array, result, strict=True):
        slab = slab.astype(np.float32, order="C", copy=False)
        np.take(slab, low, axis=axis - 1, out=out, mode="clip")
        np.take(slab, high, axis=axis - 1, out=step, mode="clip")
        step -= out
        step *= weight
        out += step
    return result


def _splines_along(array: np.ndarray, axis: int, position: np.ndarray) -> np.ndarray:
    """Cubic splines through all values along one axis, as scipy's with mode "nearest": float32.

    A value is a weighted sum of all along its line, of which those near it count. So the values of a stretch of the
    axis are one product of matrices, several times as fast as filtering first and interpolating then.
    """
    size, before, after = array.shape[axis], math.prod(array.shape[:axis]), math.prod(array.shape[axis + 1 :])
    lines = array.reshape(before, size, after)
    result = np.empty((before, len(position), after), np.float32)
    planes = max(_CUBIC_VALUES // (size * after), 1)
    for first in range(0, len(position), _TOGETHER):
        part = position[first : first + _TOGETHER]
        low, high = max(int(part.min()) - SPLINE_REACH, 0), min(int(np.ceil(part.max())) + 1 + SPLINE_REACH, size)
        at = np.meshgrid(part - low, np.arange(high - low), indexing="ij")
        weights = ndimage.map_coordinates(np.eye(high - low), at, order=3, mode="nearest").astype(np.float32)
        for plane in range(0, before, planes):
            rows, columns = slice(plane, plane + planes), slice(first, first + len(part))
            used = lines[rows, low:high].astype(np.float32, copy=False)
            if after == 1:
                np.matmul(used[..., 0], weights.T, out=result[rows, columns, 0])
            else:
                np.matmul(weights, used, out=result[rows, columns])
    return result.reshape(*array.shape[:axis], len(position), *array.shape[axis + 1 :])
