"""Pictures of label maps, in three planes: over their scan for a glance at a result, and against a reference."""

import base64
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mambahome_jax.config import Modality
from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.geometry import Box, reorient, resample_to
from mambahome_jax.imaging.volume import Volume, count_values, require_volume
from mambahome_jax.support.files import atomic_write
from mambahome_jax.support.keywords import checked

Colour = tuple[int, int, int]
Range = tuple[float, float]

PREVIEW_PIXELS, PANEL_PIXELS = 480, 380  # along the longest side of a panel, of a preview and of a comparison
MARGIN_MM = 25.0
ALPHA = 0.3
BACKGROUND, TEXT, FAINT = (16, 16, 18), (235, 235, 235), (150, 150, 155)
# Okabe and Ito's colours, told apart by colour-blind people too, then lighter and darker tones.
COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178)),
    *((170, 255, 195), (255, 170, 165), (178, 132, 255), (128, 128, 0), (160, 110, 70), (0, 220, 220)),
    *((255, 105, 180), (170, 200, 90), (120, 140, 255)),
)
# The prediction is dashed as well, so that no colour is needed to tell the two apart.
REFERENCE, PREDICTION, DIFFERENCE = COLOURS[1], COLOURS[0], (240, 240, 240)
_DASH = 12  # pixels of a dash and its gap together, counted along the diagonals
_THICK = 3  # pixels of an outline of a comparison, on either side
# Abdominal soft tissue in HU; other scans have no fixed scale and are shown between two percentiles.
CT_DISPLAY = (-160.0, 240.0)
DISPLAY_PERCENTILES = (0.5, 99.5)
AIR_HU = -900  # a scan that has values as low is shown as CT
_MOST_LABELS = 64  # that a map of unsigned integers holds; beyond, it is taken for a scan
# Of an LPS volume: name, axis that is cut, letters from left to right, and the directions for who does not see it.
_PLANES = (
    ("axial", 2, "R - L", "right to left, front to back"),
    ("coronal", 1, "R - L", "right to left, top to bottom"),
    ("sagittal", 0, "A - P", "front to back, top to bottom"),
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


@dataclass(frozen=True)
class _Slice:
    """One slice of a scan as greys (rows, columns, 3) float32, and of its label maps enlarged to these pixels."""

    name: str
    place: str
    letters: str
    directions: str
    grey: np.ndarray
    labels: tuple[np.ndarray, ...]
    cut: tuple[np.ndarray, ...]  # of the label maps, a pixel a voxel


def colour_of(label: int) -> Colour:
    """RGB, 0 to 255, of a label value of 1 or more; they repeat after the last."""
    return COLOURS[(label - 1) % len(COLOURS)]


def colours_of(labels: Collection[int]) -> dict[int, Colour]:
    """Colour of each label value: its own, or where values beyond the last colour have gaps, that of its place."""
    values = sorted(labels)
    by_place = bool(values) and values[-1] > max(len(values), len(COLOURS))
    return {value: colour_of(place if by_place else value) for place, value in enumerate(values, start=1)}


def display_range(array: np.ndarray, modality: Modality | None = None) -> tuple[float, float]:
    """Choose the values of a volume (D, H, W) that are black and white; the second is the larger."""
    if modality == "ct":
        return CT_DISPLAY
    step = max(round((array.size / 1_000_000) ** (1 / 3)), 1)
    low, high = np.percentile(array[::step, ::step, ::step], DISPLAY_PERCENTILES)
    return float(low), float(high if high > low else low + 1)


def render(
    image: Volume,
    labels: Volume,
    names: Mapping[int, str],
    modality: Modality,
    title: str = "",
    *,
    slices_of: np.ndarray | None = None,
) -> Image.Image:
    """Draw axial, coronal and sagittal slice with contours and a legend, as an RGB picture.

    In radiological display (the patient's right on the left), with millimetres of equal length.

    Args:
        image: (D0, D1, D2[, C]), of which the first channel is shown.
        labels: (D0, D1, D2) integers on the same grid.
        names: label value -> structure.
        modality: what decides which values are black and white.
        title: line above the slices.
        slices_of: label map whose fullest slices are shown; None for `labels`, the middle where there is none.
    """
    legend = _legend(np.asarray(labels.array), names, float(abs(np.linalg.det(image.affine[:3, :3]))))
    chooses = labels.array if slices_of is None else slices_of
    return _draw(image, labels.array, chooses, names, modality, legend or [(0, "no structure found")], title)


@checked
def show(volume: Volume, labels: Volume | None = None, names: Mapping[int, str] | None = None) -> Image.Image:
    """Draw axial, coronal and sagittal slice of a scan, in radiological display; a notebook shows them as a cell's end.

    Args:
        volume: (D0, D1, D2[, C]), of which the first channel is shown: CT with soft tissue, others between percentiles.
            A label map alone is shown as one.
        labels: (D0, D1, D2), drawn over it on its grid, on whichever grid it is; the slices are its fullest.
        names: label value -> structure.

    Raises DatasetError: no volumes, labels that are not whole numbers from 0 to 65535.
    """
    require_volume("volume", volume)
    if (
        labels is None
        and volume.array.dtype in (np.uint8, np.uint16)
        and len(count_values(volume.array)) <= _MOST_LABELS
    ):
        volume, labels = Volume(np.broadcast_to(np.float32(0), volume.shape), volume.affine), volume
    array, legend = np.zeros(volume.shape, np.uint8), [(0, str(volume))]
    if labels is not None:
        require_volume("labels", labels)
        if labels.shape != volume.shape or not np.allclose(labels.affine, volume.affine, atol=1e-3):
            labels = resample_to(labels, volume.affine, volume.shape, "nearest")
        array = labels.array.astype(np.uint16)
        if not np.array_equal(array, labels.array):
            found = f"labels hold values from {labels.array.min():g} to {labels.array.max():g}"
            raise DatasetError(found, expected="whole numbers, 0 to 65535", action="Are volume and labels exchanged?")
        voxel_mm3 = float(abs(np.linalg.det(volume.affine[:3, :3])))
        legend = _legend(array, names or {}, voxel_mm3) or [(0, "no structure")]
    modality: Modality | None = "ct" if volume.array.min() <= AIR_HU else None
    return _draw(volume, array, array, names or {}, modality, legend)


def _draw(
    image: Volume,
    labels: np.ndarray,
    chooses: np.ndarray,
    names: Mapping[int, str],
    modality: Modality | None,
    legend: list[tuple[int, str]],
    title: str = "",
) -> Image.Image:
    """The picture of `render`. chooses: label map whose fullest slices are shown. legend: (label or 0, text)."""
    scan, label_map, fullest = (
        reorient(Volume(array, image.affine), "LPS") for array in (image.array, labels, chooses)
    )
    window = display_range(_first_channel(scan.array), modality)
    colours = colours_of({*names, *(label for label, _ in legend if label)})
    whole = (slice(0, scan.shape[0]), slice(0, scan.shape[1]), slice(0, scan.shape[2]))
    slices = _slices(scan, (label_map.array,), _fullest(fullest.array), whole, window, PREVIEW_PIXELS)
    panels = [
        (f"{one.name}, {one.letters}, {one.place}", _coloured(one.grey, one.labels[0], colours)) for one in slices
    ]
    return _compose(panels, legend, colours, title)


def write_preview(
    path: Path, image: Volume, labels: Volume, names: Mapping[int, str], modality: Modality, title: str = ""
) -> None:
    """Write the picture of `render` as a PNG, whole or not at all. Raises OutputError where it cannot be written."""
    with atomic_write(path, "output folder") as partial:
        render(image, labels, names, modality, title).save(partial, format="PNG")


def draw_planes(
    prediction: Volume,
    reference: Volume,
    image: Volume | None = None,
    window: Range = (0.0, 1.0),
    labels: Sequence[int] | None = None,
) -> list[Panel]:
    """Draw axial, coronal and sagittal slice with both outlines, cut to the structures and MARGIN_MM around them.

    Each slice is the one with most voxels that differ; where none does, with most foreground.

    Args:
        prediction: (D0, D1, D2) label values.
        reference: the same, on the same grid.
        image: (D0, D1, D2[, C]) on the same grid, of which the first channel is shown; None for a black ground.
        window: values of the image that are black and white.
        labels: label values that count; None for all.
    """
    ours, truth = (_only(reorient(volume, "LPS").array, labels) for volume in (prediction, reference))
    ground = np.broadcast_to(np.float32(window[0]), reference.shape) if image is None else image.array
    scan = reorient(Volume(ground, reference.affine), "LPS")
    differs, foreground = ours != truth, (ours > 0) | (truth > 0)
    indices = _fullest(differs if differs.any() else foreground)
    box = _box(foreground, scan.spacing)
    panels = []
    for one in _slices(scan, (ours, truth), indices, box, window, PANEL_PIXELS):
        amount = np.count_nonzero(one.cut[0] != one.cut[1])
        caption = f"{one.name}, {one.place}"
        description = f"{caption}, {one.directions}: reference and prediction differ in {amount} voxels"
        panels.append(Panel(_compared(one.grey, *one.labels), caption, description))
    return panels


def _slices(
    scan: Volume, maps: tuple[np.ndarray, ...], indices: Sequence[int], box: Box, window: Range, pixels: int
) -> Iterator[_Slice]:
    """The slices `indices` along the three axes of an LPS scan and of label maps on its grid, within a box."""
    low, high = window
    array = _first_channel(scan.array)
    sizes = [(part.stop - part.start) * mm for part, mm in zip(box, scan.spacing, strict=True)]
    scale = pixels / max(sizes)
    for name, axis, letters, directions in _PLANES:
        across, down = (max(round(sizes[other] * scale), 1) for other in range(3) if other != axis)
        cut = tuple(indices[other] if other == axis else box[other] for other in range(3))
        # Rows run down the picture: to the back, or from superior to inferior.
        turned = [plane[cut].T if axis == 2 else plane[cut].T[::-1] for plane in (array, *maps)]
        grey = (np.clip((turned[0] - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
        large = np.asarray(Image.fromarray(grey).resize((across, down), Image.Resampling.BILINEAR))
        yield _Slice(
            name=name,
            place=f"slice {indices[axis] + 1} of {array.shape[axis]}",
            letters=letters,
            directions=directions,
            grey=np.repeat(large[..., None], 3, axis=-1).astype(np.float32),
            labels=tuple(_enlarge(plane, (down, across)) for plane in turned[1:]),
            cut=tuple(turned[1:]),
        )


def _first_channel(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.ndim == 4 else array


def _fullest(labels: np.ndarray) -> list[int]:
    """For each axis the slice with the most foreground, the middle one where there is none."""
    counts = [np.zeros(n, np.int64) for n in labels.shape]
    # Along the axis whose slices are closest to contiguous in memory; NIfTI's order is the reverse of NumPy's.
    outer = int(np.argmax(np.abs(labels.strides)))
    first, second = (axis for axis in range(3) if axis != outer)
    for index, plane in enumerate(np.moveaxis(labels, outer, 0)):
        foreground = plane > 0
        counts[first] += foreground.sum(axis=1)
        counts[second] += foreground.sum(axis=0)
        counts[outer][index] = foreground.sum()
    return [int(count.argmax()) if count.any() else len(count) // 2 for count in counts]


def _only(array: np.ndarray, labels: Sequence[int] | None) -> np.ndarray:
    """A label map with 0 for every value that is not among `labels`."""
    if labels is None:
        return array
    table = np.zeros(max([int(array.max()), *labels]) + 1, np.uint16)
    table[list(labels)] = list(labels)
    return table[array]


def _box(foreground: np.ndarray, spacing: np.ndarray) -> Box:
    """The box of what is set with MARGIN_MM around it; everything where nothing is set."""
    parts = []
    for axis, size in enumerate(foreground.shape):
        used = np.flatnonzero(foreground.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = int(np.ceil(MARGIN_MM / spacing[axis]))
        first, last = (int(used[0]) - margin, int(used[-1]) + margin + 1) if used.size else (0, size)
        parts.append(slice(max(first, 0), min(last, size)))
    return parts[0], parts[1], parts[2]


def _enlarge(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(labels.shape, shape, strict=True))
    return labels[np.ix_(rows, columns)]


def _outline(labels: np.ndarray, thick: int) -> np.ndarray:
    """Pixels of a structure within `thick` of another one or the background."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in range(1, thick + 1):
            edges, values = (np.moveaxis(array, axis, 0) for array in (edge, labels))
            changes = values[step:] != values[:-step]
            edges[step:] |= changes
            edges[:-step] |= changes
    return edge & (labels > 0)


def _coloured(grey: np.ndarray, labels: np.ndarray, palette: Mapping[int, Colour]) -> Image.Image:
    colours = np.zeros(grey.shape, np.float32)
    for label in np.unique(labels[labels > 0]):
        colours[labels == label] = palette[int(label)]
    strength = np.where(_outline(labels, 1), 1.0, ALPHA) * (labels > 0)
    return Image.fromarray((grey + (colours - grey) * strength[..., None]).astype(np.uint8))


def _compared(grey: np.ndarray, ours: np.ndarray, truth: np.ndarray) -> bytes:
    """A PNG of greys (rows, columns, 3) with the outlines of two label maps (rows, columns) and what differs."""
    differs = ours != truth
    grey[differs] += (np.array(DIFFERENCE, np.float32) - grey[differs]) * 0.25
    grey[_outline(truth, _THICK)] = REFERENCE
    rows, columns = np.indices(ours.shape)
    grey[_outline(ours, _THICK) & ((rows + columns) % _DASH < _DASH // 2)] = PREDICTION
    content = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def _legend(labels: np.ndarray, names: Mapping[int, str], voxel_mm3: float) -> list[tuple[int, str]]:
    entries = []
    for label, count in count_values(labels).items():
        ml = count * voxel_mm3 / 1000
        amount = f"{ml:.0f}" if ml >= 100 else f"{ml:.3g}"
        entries.append((label, f"{names.get(label, f'label_{label}')}  {amount} ml"))
    return [(label, text) for label, text in entries if label]


def _compose(
    panels: list[tuple[str, Image.Image]], legend: list[tuple[int, str]], palette: Mapping[int, Colour], title: str
) -> Image.Image:
    """Panels side by side under their captions, the legend below in as many columns as fit."""
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    gap, header, line = 12, 32 if title else 8, 26
    width = gap + sum(panel.width + gap for _, panel in panels)
    height = max(panel.height for _, panel in panels)
    column = max(int(font.getlength(text)) for _, text in legend) + 50
    width = max(width, column + 2 * gap, int(font.getlength(title)) + 2 * gap)
    columns = max((width - 2 * gap) // column, 1)
    rows = -(-len(legend) // columns)
    canvas = Image.new("RGB", (width, header + 24 + height + gap + rows * line + gap), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 6), title, TEXT, font)
    x = gap
    for caption, panel in panels:
        draw.text((x, header), caption, FAINT, small)
        canvas.paste(panel, (x, header + 24))
        x += panel.width + gap
    for number, (label, text) in enumerate(legend):
        x, y = gap + (number % columns) * column, header + 24 + height + gap + (number // columns) * line
        if label:
            draw.rectangle((x, y + 3, x + 18, y + 19), fill=palette[label])
        draw.text((x + 26 if label else x, y), text, TEXT, font)
    return canvas
