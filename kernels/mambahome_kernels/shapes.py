"""Named shapes that tests and benchmarks of the kernels share: those of the networks, and those that fit no tile."""

# (channels, length) of the published network's four stages on a patch of 128^3.
SCAN_STAGES = {"stage 0": (96, 262144), "stage 1": (192, 32768), "stage 2": (384, 4096), "stage 3": (768, 512)}
SCAN_RAGGED = {"ends within a tile": (96, 1025), "no tile is full": (90, 7), "one step": (16, 1)}

_CUBE, _IN_PLANE = (3, 3, 3), (3, 3, 1)
# (x, output channels, kernel). Thick slices: seven patches of 224 x 256 x 10, spacing 1.5 1.5 10 mm.
CONV3D = {
    "published": ((2, 128, 128, 128, 48), 48, _CUBE),
    "small": ((4, 112, 112, 80, 24), 24, _CUBE),
    "small, second stage": ((4, 56, 56, 40, 24), 48, _CUBE),
    "ragged": ((1, 9, 13, 22, 32), 32, _CUBE),
    "as wide as a square": ((1, 5, 8, 8, 16), 64, _CUBE),
    "thick slices": ((7, 224, 256, 10, 24), 24, _IN_PLANE),
    "thick slices, to the second stage": ((7, 112, 128, 10, 24), 48, _IN_PLANE),
    "thick slices, second stage": ((7, 112, 128, 10, 48), 48, _IN_PLANE),
    "thick slices, ragged": ((2, 9, 21, 11, 64), 40, _IN_PLANE),
    "slices first": ((2, 20, 192, 160, 32), 32, (1, 3, 3)),
}
# inputs x outputs, at the published grid.
CONV3D_CHANNELS = ((48, 48), (24, 24), (24, 48), (32, 32), (16, 16))

NORM_ACT = {"ragged": (2, 4, 5, 6, 3)}
