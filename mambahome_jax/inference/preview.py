"""A picture of a scan with its label map, to see at a glance whether a segmentation makes sense."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mambahome_jax.config import Modality
from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.intensity import display_range
from mambahome_jax.imaging.volume import Volume
from mambahome_jax.support.files import atomic_write

PANEL_PIXELS = 480
ALPHA = 0.3
BACKGROUND, TEXT, FAINT = (16, 16, 18), (235, 235, 235), (150, 150, 155)
# Okabe and Ito's colours, told apart by colour-blind people too, then lighter and darker tones.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (170, 255, 195),
    (255, 170, 165),
    (178, 132, 255),
    (128, 128, 0),
    (160, 110, 70),
    (0, 220, 220),
    (255, 105, 180),
    (170, 200, 90),
    (120, 140, 255),
)


def colour_of(label: int) -> tuple[int, int, int]:
    """RGB, 0 to 255, of a label value of 1 or more; they repeat after the last."""
    return COLOURS[(label - 1) % len(COLOURS)]


def colours_of(labels: Collection[int]) -> dict[int, tuple[int, int, int]]:
    """Colour of each label value: its own, or where values beyond the last colour have gaps, that of its place."""
    values = sorted(labels)
    by_place = bool(values) and values[-1] > max(len(values), len(COLOURS))
    return {value: colour_of(place if by_place else value) for place, value in enumerate(values, start=1)}


def render(
    image: Volume,
    labels: Volume,
    names: Mapping[int, str],
    modality: Modality,
    title: str = "",
    *,
    slices_of: np.ndarray | None = None,
) -> Image.Image:
    """Axial, coronal and sagittal slice with contours and a legend, as an RGB picture.

    image: (D0, D1, D2[, C]), of which the first channel is shown; labels: (D0, D1, D2) integers on the same grid;
    names: label value -> structure. Each slice is the one with the most foreground in `slices_of`, a label map like
    labels.array and by default that one (the middle slice where there is none), in radiological display (the patient's
    right on the left) and with millimetres of equal length.
    """
    scan = reorient(image, "LPS")
    label_map = reorient(Volume(np.asarray(labels.array), image.affine), "LPS").array
    array = scan.array[..., 0] if scan.array.ndim == 4 else scan.array
    low, high = display_range(array, modality)
    scale = PANEL_PIXELS / max(n * s for n, s in zip(array.shape, scan.spacing, strict=True))
    chooses = label_map if slices_of is None else reorient(Volume(np.asarray(slices_of), image.affine), "LPS").array
    fullest = _fullest_slices(chooses)
    legend = _legend(label_map, names, float(abs(np.linalg.det(image.affine[:3, :3]))))
    colours = colours_of({*names, *(label for label, _ in legend)})
    panels = []
    for name, axis, flip in (("axial, R - L", 2, False), ("coronal, R - L", 1, True), ("sagittal, A - P", 0, True)):
        index = fullest[axis]
        across, down = [a for a in range(3) if a != axis]
        size = tuple(max(round(array.shape[a] * scan.spacing[a] * scale), 1) for a in (across, down))
        grey = (np.clip((_slice(array, axis, index, flip) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        picture = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
        overlay = _enlarge(_slice(label_map, axis, index, flip), (size[1], size[0]))
        panels.append((f"{name}, slice {index + 1} of {array.shape[axis]}", _coloured(picture, overlay, colours)))
    return _compose(panels, legend, colours, title)


def write_preview(
    path: Path, image: Volume, labels: Volume, names: Mapping[int, str], modality: Modality, title: str = ""
) -> None:
    """Write `render`'s picture as a PNG, whole or not at all. Raises OutputError where it cannot be written."""
    with atomic_write(path, "output folder") as partial:
        render(image, labels, names, modality, title).save(partial, format="PNG")


def _fullest_slices(labels: np.ndarray) -> list[int]:
    """For each axis the slice with the most foreground, the middle one where there is none."""
    counts = [np.zeros(n, np.int64) for n in labels.shape]
    outer = _outermost(labels)
    first, second = (axis for axis in range(3) if axis != outer)
    for index, plane in enumerate(np.moveaxis(labels, outer, 0)):
        found = plane > 0
        counts[first] += found.sum(axis=1)
        counts[second] += found.sum(axis=0)
        counts[outer][index] = found.sum()
    return [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]


def _outermost(array: np.ndarray) -> int:
    """The axis along which slices are closest to contiguous in memory; NIfTI's order is the reverse of NumPy's."""
    return int(np.argmax(np.abs(array.strides)))


def _slice(array: np.ndarray, axis: int, index: int, flip: bool) -> np.ndarray:
    """(rows, columns) of one slice of an LPS volume; `flip` puts superior at the top."""
    plane = np.moveaxis(array, axis, 0)[index].T
    return plane[::-1] if flip else plane


def _enlarge(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape, strict=True))
    return labels[np.ix_(rows, columns)]


def _coloured(grey: np.ndarray, labels: np.ndarray, palette: Mapping[int, tuple[int, int, int]]) -> Image.Image:
    rgb = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
    colours = np.zeros((*labels.shape, 3), np.float32)
    for label in np.unique(labels[labels > 0]):
        colours[labels == label] = palette[int(label)]
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        here, there = (np.moveaxis(a, axis, 0) for a in (edge, labels))
        changes = there[1:] != there[:-1]
        here[1:] |= changes
        here[:-1] |= changes
    strength = np.where(edge, 1.0, ALPHA) * (labels > 0)
    return Image.fromarray((rgb + (colours - rgb) * strength[..., None]).astype(np.uint8))


def label_counts(labels: np.ndarray) -> dict[int, int]:
    """Voxels of each label value above 0 that occurs in (D0, D1, D2), in order of value."""
    total = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    # Plane by plane, as bincount widens what it is given to eight bytes a voxel.
    for plane in np.moveaxis(labels, _outermost(labels), 0):
        total += np.bincount(plane.ravel(order="K"), minlength=len(total))
    return {int(label): int(total[label]) for label in np.flatnonzero(total) if label}


def _legend(labels: np.ndarray, names: Mapping[int, str], voxel_mm3: float) -> list[tuple[int, str]]:
    return [
        (label, f"{names.get(label, f'label_{label}')}  {_volume(count * voxel_mm3 / 1000)} ml")
        for label, count in label_counts(labels).items()
    ]


def _compose(
    panels: list[tuple[str, Image.Image]],
    legend: list[tuple[int, str]],
    palette: Mapping[int, tuple[int, int, int]],
    title: str,
) -> Image.Image:
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    gap, header, line = 12, 32 if title else 8, 26
    width = gap + sum(panel.width + gap for _, panel in panels)
    height = max(panel.height for _, panel in panels)
    entries = legend or [(0, "no structure found")]
    column = max(int(font.getlength(text)) for _, text in entries) + 50
    width = max(width, column + 2 * gap, int(font.getlength(title)) + 2 * gap)
    columns = max((width - 2 * gap) // column, 1)
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (width, header + 24 + height + gap + rows * line + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 6), title, TEXT, font)
    x = gap
    for caption, panel in panels:
        draw.text((x, header), caption, FAINT, small)
        canvas.paste(panel, (x, header + 24))
        x += panel.width + gap
    for number, (label, text) in enumerate(entries):
        x, y = gap + (number % columns) * column, header + 24 + height + gap + (number // columns) * line
        if label:
            draw.rectangle((x, y + 3, x + 18, y + 19), fill=palette[label])
        draw.text((x + 26 if label else x, y), text, TEXT, font)
    return canvas


def _volume(ml: float) -> str:
    return f"{ml:.0f}" if ml >= 100 else f"{ml:.3g}"
