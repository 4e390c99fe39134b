"""Surfaces of masks as patches with an area in mm2, one a 2 x 2 x 2 voxels that are neither all in nor all out.

A patch runs through the middles of those lines between neighbouring voxels that the surface crosses (marching cubes).
Where the corners of a face alternate, those of which there are fewer in the cube are cut off from each other. A loop of
more than three middles is cut into triangles from the one middle that gives them the largest area in a cube of unit
length.
"""

import functools
import itertools

import numpy as np

_Corner = tuple[int, int, int]
_Point = tuple[float, float, float]
_CORNERS: tuple[_Corner, ...] = tuple((i, j, k) for i, j, k in itertools.product((0, 1), repeat=3))


def codes_of(mask: np.ndarray) -> np.ndarray:
    """(D + 1, H + 1, W + 1) uint8: of a mask (D, H, W), which of the 2 x 2 x 2 voxels around each corner are in it.

    Bit n is the n-th of those voxels in the order of their indices; outside of the array nothing is in it.
    """
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(_CORNERS):
        # The voxel at `corner` of the eight around a point is that point's index less 1, plus the corner.
        place = tuple(slice(1 - c, 1 - c + n) for c, n in zip(corner, mask.shape, strict=True))
        codes[place] |= mask.astype(np.uint8) << bit
    return codes


def areas_of(spacing: np.ndarray) -> np.ndarray:
    """(256,) float64, mm2 of the patch of each code at a spacing (3,) in mm; 0 where there is none."""
    # A triangle's area vector is a cross product: its entries scale with the spacing of the other two axes.
    scale = np.prod(spacing) / np.asarray(spacing, np.float64)
    return np.array([np.linalg.norm(vectors * scale, axis=1).sum() for vectors in _vectors()])


@functools.cache
def _vectors() -> tuple[np.ndarray, ...]:
    """Of each code the area vectors of its triangles, (n, 3), in a cube of unit length."""
    found = []
    for code in range(256):
        inside = {corner: bool(code >> bit & 1) for bit, corner in enumerate(_CORNERS)}
        triangles = [_triangles(np.array(loop)) for loop in _loops(inside)]
        found.append(np.concatenate([np.zeros((0, 3)), *triangles]))
    return tuple(found)


def _loops(inside: dict[_Corner, bool]) -> list[list[_Point]]:
    """Closed loops of the middles of edges that the surface crosses."""
    cut_off = sum(inside.values()) <= 4
    beside: dict[_Point, list[_Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = [_on_face(axis, side, *corner) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        middles = [_middle(ring[i], ring[i - 1]) for i in range(4) if inside[ring[i]] != inside[ring[i - 1]]]
        if len(middles) == 2:
            pairs = [(middles[0], middles[1])]
        else:
            ends = [i for i in range(4) if len(middles) == 4 and inside[ring[i]] == cut_off]
            pairs = [(_middle(ring[i], ring[i - 1]), _middle(ring[i], ring[(i + 1) % 4])) for i in ends]
        for one, other in pairs:
            beside.setdefault(one, []).append(other)
            beside.setdefault(other, []).append(one)
    loops = []
    while beside:
        loop = [next(iter(beside))]
        # Each middle lies on two faces, so it has two neighbours; a walk that never turns back ends where it began.
        while following := [point for point in beside.pop(loop[-1]) if point in beside]:
            loop.append(following[0])
        loops.append(loop)
    return loops


def _triangles(loop: np.ndarray) -> np.ndarray:
    """(n - 2, 3) area vectors of the triangles that a loop (n, 3) is cut into."""
    fans = []
    for start in range(len(loop)):
        sides = np.roll(loop, -start, axis=0)[1:] - loop[start]
        fans.append(np.cross(sides[:-1], sides[1:]) / 2)
    return max(fans, key=lambda fan: round(float(np.linalg.norm(fan, axis=1).sum()), 9))


def _on_face(axis: int, side: int, first: int, second: int) -> _Corner:
    corner = [first, second]
    corner.insert(axis, side)
    return corner[0], corner[1], corner[2]


def _middle(one: _Corner, other: _Corner) -> _Point:
    a, b, c = ((x + y) / 2 for x, y in zip(one, other, strict=True))
    return a, b, c
