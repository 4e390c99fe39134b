"""Synthetic abdominal CT scans with labels, for the demo and for tests: no patient, no download.

Anatomy is written as implicit functions in millimetres of a canonical body (x to the patient's right, y to the front,
z up; negative inside), so any grid can sample it. What varies from case to case: pose, proportions, a smooth warp,
contrast, noise, and the grid's spacing, orientation and obliquity.
"""

import itertools
import math
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mambahome_jax.imaging.geometry import reorient
from mambahome_jax.imaging.volume import Volume, write_volume
from mambahome_jax.support.files import write_json

LABELS = {1: "liver", 2: "spleen", 3: "kidneys", 4: "aorta"}

_ORIENTATIONS = ("RAS", "LPS", "LAS", "LAI", "PSR", "RPS", "ASL", "LPI")
_FIELD_OF_VIEW = (330.0, 252.0, 200.0)  # mm


def phantom(seed: int) -> tuple[Volume, Volume]:
    """Image (int16, HU) and label map (uint8, see LABELS) of one synthetic patient, about 105 x 90 x 48 voxels.

    Both lie on the same grid. The same seed gives the same patient, whatever else was made before.
    """
    rng = np.random.default_rng(seed)
    affine, shape = _random_grid(rng)
    x, y, z = _coordinates(affine, shape, rng)
    hu, labels = _paint(x, y, z, rng)
    texture = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 2.0)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.6)
    hu += rng.uniform(4, 8) / texture.std() * texture + rng.uniform(9, 16) / noise.std() * noise
    image = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    orientation = str(rng.choice(_ORIENTATIONS))
    return reorient(Volume(image, affine), orientation), reorient(Volume(labels, affine), orientation)


def write_phantoms(folder: str | Path, count: int, seed: int = 0, first: int = 1) -> list[str]:
    """Write phantoms as FOLDER/images/<case>.nii.gz and FOLDER/labels/<case>.nii.gz, and the names into dataset.json.

    Cases are called phantom_001 and so on from `first`; case n of a seed is always the same patient. Returns the names.
    Raises OutputError.
    """
    folder = Path(folder)
    names = []
    for number in range(first, first + count):
        name = f"phantom_{number:03d}"
        image, label = phantom(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        write_volume(folder / "images" / f"{name}.nii.gz", image)
        write_volume(folder / "labels" / f"{name}.nii.gz", label)
        names.append(name)
    table = {
        "name": "phantom",
        "modality": {"0": "CT"},
        "labels": {"0": "background"} | {str(value): name for value, name in LABELS.items()},
    }
    write_json(folder / "dataset.json", table, indent=2)
    return names


def _random_grid(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    spacing = np.round([rng.uniform(2.9, 3.4), rng.uniform(2.7, 3.1), rng.uniform(3.6, 5.0)], 2)
    shape = np.rint(np.array(_FIELD_OF_VIEW) / spacing).astype(int)
    # A third of the scans lie oblique on the table.
    angles = rng.uniform(-6, 6, 3) if rng.random() < 1 / 3 else np.zeros(3)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)
    return affine, (int(shape[0]), int(shape[1]), int(shape[2]))


def _coordinates(affine: np.ndarray, shape: tuple[int, int, int], rng: np.random.Generator) -> list[np.ndarray]:
    """Canonical x, y, z in mm of each voxel, float32: how one patient differs from the canonical body."""
    rotation = Rotation.from_euler("xyz", rng.uniform(-5, 5, 3), degrees=True).as_matrix()
    shift = rng.uniform(-1, 1, 3) * (12, 8, 14)
    scale = rng.uniform(0.9, 1.04) * rng.uniform(0.96, 1.04, 3)
    waves = rng.uniform(-1, 1, (3, 3, 3)) * (2 * np.pi / 130)  # per mm: 3 components of 3 terms
    phases = rng.uniform(0, 2 * np.pi, (3, 3))
    amplitudes = rng.uniform(-1, 1, (3, 3)) * 4.0  # mm
    matrix = np.diag(1 / scale) @ rotation.T
    to_body, origin = matrix @ affine[:3, :3], matrix @ (affine[:3, 3] - shift)
    index = np.ogrid[tuple(slice(n) for n in shape)]
    rigid = [
        sum((to_body[row, j] * index[j] for j in range(3)), start=origin[row]).astype(np.float32) for row in range(3)
    ]
    bent = [axis.copy() for axis in rigid]
    for row, term in np.ndindex(3, 3):
        a, b, c = waves[row, term].tolist()
        wave = np.sin(a * rigid[0] + b * rigid[1] + c * rigid[2] + float(phases[row, term]))
        bent[row] += float(amplitudes[row, term]) * wave
    return bent


class _Canvas:
    """Attenuation in HU (float32, without noise) and labels (uint8) at canonical coordinates in mm, painted upon."""

    def __init__(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator):
        self.x, self.y, self.z, self.rng = x, y, z, rng
        self.hu, self.labels = np.full(x.shape, -1000, np.float32), np.zeros(x.shape, np.uint8)

    def put(self, inside: np.ndarray, value: float | np.ndarray, label: int = 0) -> None:
        # An edge fades over a voxel or so: partial volume.
        cover = np.clip(0.5 - inside / 3.5, 0, 1)
        self.hu += cover * (value - self.hu)
        if label:
            self.labels[inside < 0] = label

    def blob(self, centre: tuple[float, float, float], radii: tuple[float, float, float], tilt: float = 0.0):
        """Ellipsoid near its place and size, turned by `tilt` degrees about the y axis."""
        c = (np.array(centre) + self.rng.uniform(-4, 4, 3)).tolist()
        r = np.array(radii) * self.rng.uniform(0.92, 1.08, 3)
        angle = math.radians(tilt + self.rng.uniform(-8, 8))
        cos, sin = math.cos(angle), math.sin(angle)
        u, w = self.x - c[0], self.z - c[2]
        return _ellipsoid(cos * u + sin * w, self.y - c[1], cos * w - sin * u, r)


def _paint(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Attenuation in HU (float32, without noise) and labels (uint8) at canonical coordinates in mm."""
    canvas = _Canvas(x, y, z, rng)
    fat, muscle = rng.uniform(-115, -90), rng.uniform(45, 65)
    # Portal inflow phase, some 40 s after the contrast medium: aorta, kidneys, spleen, liver from bright to dull.
    blood, liver_hu = rng.uniform(240, 300), rng.uniform(85, 105)
    cavity = _paint_trunk(canvas, fat, muscle)
    _paint_spine_and_bowel(canvas, muscle)
    _paint_organs(canvas, cavity, blood, liver_hu)
    return canvas.hu, canvas.labels


def _paint_trunk(canvas: _Canvas, fat: float, muscle: float) -> np.ndarray:
    """Table, skin, fat, muscle and ribs; returns the cavity."""
    x, y, z, rng, put = canvas.x, canvas.y, canvas.z, canvas.rng, canvas.put
    belly = rng.uniform(10, 26)  # mm of fat under the skin

    skin = _cylinder(x, y, 150.0, 106.0)
    cavity = _cylinder(x, y - 12, 122.0, 78.0)
    put(np.abs(y + 128 + rng.uniform(0, 8)) - 4, -250.0)  # the table
    put(skin, 20.0)
    put(skin + 3, fat)
    put(np.maximum(skin + belly, -118 - y), muscle)
    put(cavity, fat + 10)
    lines = (z + 0.4 * y) / 26
    stripes = np.abs(lines - np.rint(lines)) * 26 - 5
    put(np.maximum.reduce([np.abs(cavity - 6) - 4, stripes, -25 - z - 0.4 * y, y - 72]), rng.uniform(280, 420))
    return cavity


def _paint_spine_and_bowel(canvas: _Canvas, muscle: float) -> None:
    x, y, z, rng, put = canvas.x, canvas.y, canvas.z, canvas.rng, canvas.put
    # Spine: vertebrae and discs, canal, processes, and the muscles beside them.
    for side in (-1, 1):
        put(_ellipsoid(x - side * 36, y + 82, z, (27.0, 19.0, 1e3)), muscle)
        put(_ellipsoid(x - side * 36, y + 52, z + 40, (15.0, 15.0, 70.0)), muscle)
    column = np.hypot(x, (y + 62) * 1.1)
    height = (z + rng.uniform(-15, 15)) / 34
    disc = np.abs(height - np.rint(height)) * 34 < 4
    put(column - 22, np.where(disc, 85.0, np.where(column > 18, rng.uniform(330, 450), rng.uniform(120, 170))))
    put(np.maximum(np.hypot(x, y + 96) - 14, np.abs(x) - 9), rng.uniform(280, 400))
    put(np.hypot(x, y + 93) - 7.5, 30.0)

    # Bowel: loops with wall, contents and some gas, low in front.
    for _ in range(12):
        place = (rng.uniform(-75, 75), rng.uniform(5, 62), rng.uniform(-95, -15))
        loop = _ellipsoid(x - place[0], y - place[1], z - place[2], rng.uniform(10, 19, 3))
        put(loop, rng.uniform(50, 90))
        put(loop + 3.5, float(rng.choice([15.0, 35.0, -700.0], p=[0.4, 0.4, 0.2])))


def _paint_organs(canvas: _Canvas, cavity: np.ndarray, blood: float, liver_hu: float) -> None:
    """Lungs and heart, then the organs of the abdomen, those with labels last."""
    x, y, z, rng, put, blob = canvas.x, canvas.y, canvas.z, canvas.rng, canvas.put, canvas.blob
    dome = [84 - 40 * (((x - side * 62) / 85) ** 2 + ((y - 5) / 85) ** 2) for side in (1, -1)]
    below = z - np.maximum(dome[0] + rng.uniform(0, 8), dome[1] - 4)
    put(np.maximum(cavity + 4, 4 - below), -850.0)
    put(np.maximum(_ellipsoid(x + 15, y - 30, z - 112, (52.0, 42.0, 36.0)), 2 - below), blood * 0.6)

    stomach = np.maximum(blob((-42, 36, 38), (40, 32, 42), 20), 5 + below)
    put(stomach, 75.0)
    put(stomach + 5, np.where(y > rng.uniform(48, 60), -900.0, rng.uniform(5, 40)))

    # Pancreas and vena cava: unlabelled neighbours that look much like what is labelled.
    put(_tube(x, y, z, rng.uniform(-4, 4, (5, 3)) + _PANCREAS, 11.0), rng.uniform(80, 105))
    put(np.hypot(x - 24 - 4 * np.sin(z / 45), y + 26) - rng.uniform(9, 12), rng.uniform(80, 120))

    kidneys = {}
    for side, low in ((-1, 0.0), (1, 14.0)):
        kidney = blob((side * 62, -36, -18 - low), (26, 23, 48), side * -10.0)
        hilum = _ellipsoid(x - side * 40, y + 32, z + 18 + low, (15.0, 12.0, 16.0))
        kidneys[side] = np.maximum(kidney, -hilum)

    gallbladder = blob((52, 44, -8), (14, 15, 22))
    liver = _smooth_union(blob((68, 6, 34), (66, 70, 64)), blob((8, 46, 46), (62, 32, 32)), 14.0)
    liver = np.maximum.reduce([liver, cavity + 5, below + 6, 4 - kidneys[1], 2 - gallbladder, 3 - stomach])
    put(gallbladder, rng.uniform(0, 20))
    put(liver, liver_hu, 1)
    for _ in range(5):
        middle, direction = rng.uniform((30, -20, 0), (95, 35, 70)), rng.uniform(-30, 30, 3)
        vessel = _tube(x, y, z, np.array([middle - direction, middle + direction]), 4.0)
        put(np.maximum(vessel, liver + 4), liver_hu + 45)

    spleen = np.maximum.reduce(
        [blob((-92, -18, 36), (30, 48, 46)), cavity + 5, below + 6, 4 - kidneys[-1], 3 - stomach]
    )
    put(spleen, liver_hu + rng.uniform(35, 50), 2)
    cortex = rng.uniform(185, 215)
    for kidney in kidneys.values():
        put(kidney, np.where(kidney < -9, cortex - 15, cortex), 3)
    bend = rng.uniform(-6, 6, 2).tolist()
    aorta = np.hypot(x + 9 + bend[0] * np.sin(z / 40), y + 28 + bend[1] * np.cos(z / 55)) - rng.uniform(13, 15.5)
    put(aorta, blood, 4)


_PANCREAS = np.array([(38, 8, -12), (18, 16, -4), (-8, 12, 4), (-36, -2, 12), (-66, -12, 22)], dtype=np.float64)


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, radii) -> np.ndarray:
    """About the distance in mm from the surface, negative inside."""
    a, b, c = (float(r) for r in radii)
    scaled = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) + 1e-6
    return scaled * (scaled - 1) / (np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2) + 1e-6)


def _cylinder(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """Along z with a superellipse as its section; the distance is radial."""
    scaled = (np.abs(x / a) ** 2.5 + np.abs(y / b) ** 2.5) ** 0.4 + 1e-6
    return np.hypot(x, y) * (1 - 1 / scaled)


def _tube(x: np.ndarray, y: np.ndarray, z: np.ndarray, points: np.ndarray, radius: float) -> np.ndarray:
    """Around a line through points (n, 3)."""
    nearest = np.full(x.shape, np.inf, np.float32)
    for start, end in itertools.pairwise(points):
        a, b, c = (end - start).tolist()
        u, v, w = (axis - float(value) for axis, value in zip((x, y, z), start, strict=True))
        t = np.clip((u * a + v * b + w * c) / (a * a + b * b + c * c), 0, 1)
        square = (u - t * a) ** 2 + (v - t * b) ** 2 + (w - t * c) ** 2
        np.minimum(nearest, square, out=nearest)
    return np.sqrt(nearest) - radius


def _smooth_union(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    blend = np.clip(0.5 + (b - a) / (2 * width), 0, 1)
    return b + blend * (a - b) - width * blend * (1 - blend)
