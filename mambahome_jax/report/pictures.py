"""Pictures of a prediction over its reference: three planes where the two differ most, as PNG."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume

PANEL_PIXELS = 380
MARGIN_MM = 25.0
# Okabe and Ito's sky blue and orange; the prediction is dashed as well, so that no colour is needed to tell them apart.
REFERENCE, PREDICTION = (86, 180, 233), (230, 159, 0)
DIFFERENCE = (240, 240, 240)
_DASH = 12  # pixels of a dash and its gap together, counted along the diagonals
_THICK = 3
# What a picture of an LPS volume shows: name, axis that is cut, whether superior must be turned to the top.
_PLANES = (
    ("axial", 2, False, "right to left, front to back"),
    ("coronal", 1, True, "right to left, top to bottom"),
    ("sagittal", 0, True, "front to back, top to bottom"),
)


@dataclass(frozen=True)
class Panel:
    """One slice: `png` the file's bytes, `caption` and `description` for people who see it and who do not."""

    png: bytes
    caption: str
    description: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def draw_planes(
    prediction: Volume,
    reference: Volume,
    image: Volume | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    labels: Sequence[int] | None = None,
) -> list[Panel]:
    """Axial, coronal and sagittal slice with both outlines, cut to the structures and MARGIN_MM around them.

    prediction, reference: (D0, D1, D2) label values on one grid; image: (D0, D1, D2[, C]) on the same grid, of which
    the first channel is shown between `window`, black and white; without it the ground is black. labels: values that
    count, None for all. Each slice is the one with most voxels that differ; where none does, with most foreground.
    """
    maps = [reorient(volume, "LPS") for volume in (prediction, reference)]
    spacing = maps[1].spacing
    ours, truth = (_only(volume.array, labels) for volume in maps)
    scan = None if image is None else reorient(Volume(image.array, reference.affine), "LPS").array
    indices = _fullest(ours != truth, (ours > 0) | (truth > 0))
    box = _box((ours > 0) | (truth > 0), spacing)
    scale = PANEL_PIXELS / max((part.stop - part.start) * mm for part, mm in zip(box, spacing, strict=True))
    panels = []
    for name, axis, flip, directions in _PLANES:
        across, down = (other for other in range(3) if other != axis)
        size = tuple(max(round((box[a].stop - box[a].start) * spacing[a] * scale), 1) for a in (across, down))
        cut = tuple(indices[a] if a == axis else box[a] for a in range(3))
        grey = np.zeros(truth[cut].shape, np.uint8) if scan is None else _grey(scan[cut], window)
        ground, own, true = ((plane.T[::-1] if flip else plane.T) for plane in (grey, ours[cut], truth[cut]))
        caption = f"{name}, slice {indices[axis] + 1} of {truth.shape[axis]}"
        amount = int(np.count_nonzero(own != true))
        description = f"{caption}, {directions}: reference and prediction differ in {amount} voxels"
        panels.append(Panel(_png(ground, own, true, (size[0], size[1])), caption, description))
    return panels


def _only(array: np.ndarray, labels: Sequence[int] | None) -> np.ndarray:
    """A label map with 0 for every value that is not among `labels`."""
    if labels is None:
        return array
    table = np.zeros(max([int(array.max()), *labels]) + 1, np.uint16)
    table[list(labels)] = list(labels)
    return table[array]


def _grey(plane: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """uint8 of a slice (H, W[, C]), its first channel."""
    low, high = window
    first = plane[..., 0] if plane.ndim == 3 else plane
    return (np.clip((first - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _fullest(different: np.ndarray, foreground: np.ndarray) -> list[int]:
    """For each axis the slice with most of what differs, else most foreground, else the middle."""
    chosen = different if different.any() else foreground
    counts = [chosen.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]


def _box(foreground: np.ndarray, spacing: np.ndarray) -> tuple[slice, slice, slice]:
    """The box of what is set with MARGIN_MM around it; everything where nothing is set."""
    parts = []
    for axis in range(3):
        found = np.flatnonzero(foreground.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = int(np.ceil(MARGIN_MM / spacing[axis]))
        first, last = (found[0] - margin, found[-1] + margin + 1) if found.size else (0, foreground.shape[axis])
        parts.append(slice(max(int(first), 0), min(int(last), foreground.shape[axis])))
    return parts[0], parts[1], parts[2]


def _png(grey: np.ndarray, ours: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> bytes:
    """grey uint8, ours, truth label values, all (rows, columns); size: (width, height) in pixels."""
    ground = np.asarray(Image.fromarray(np.ascontiguousarray(grey)).resize(size, Image.Resampling.BILINEAR))
    rgb = np.repeat(ground[..., None], 3, axis=-1).astype(np.float32)
    large, large_truth = (_enlarge(array, (size[1], size[0])) for array in (ours, truth))
    differs = large != large_truth
    rgb[differs] += (np.array(DIFFERENCE, np.float32) - rgb[differs]) * 0.25
    rgb[_outline(large_truth)] = REFERENCE
    rows, columns = np.indices(large.shape)
    dashes = (rows + columns) % _DASH < _DASH // 2
    rgb[_outline(large) & dashes] = PREDICTION
    content = io.BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def _enlarge(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape, strict=True))
    return labels[np.ix_(rows, columns)]


def _outline(labels: np.ndarray) -> np.ndarray:
    """Pixels of a structure within _THICK of another one or the background."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in range(1, _THICK + 1):
            here, there = (np.moveaxis(array, axis, 0) for array in (edge, labels))
            changes = there[step:] != there[:-step]
            here[step:] |= changes
            here[:-step] |= changes
    return edge & (labels > 0)
