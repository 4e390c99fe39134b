"""Draw mixing.png: which voxels' outputs change where one voxel of the input does, in each layer that mixes tokens.

python docs/explanation/mixing.py

A plane of 32 x 32 voxels, 48 channels, layers with their initial weights; HoME with four groups of 256 tokens. A layer
is one call: a network has several, with convolutions between them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from mambahome_jax.model.home import HoME
from mambahome_jax.model.mamba import GatedConv, Mamba

PICTURE = Path(__file__).with_suffix(".png")
SIDE, CHANNELS, GROUP = 32, 48, 256
CHANGED = (13, 20)  # row and column of the voxel
LOWEST = 1e-5  # of the largest change; less is drawn as nothing
VOXEL, GAP, TOP = 7, 26, 30  # px
INK, RED = (27, 30, 35), (200, 60, 0)


def layers() -> dict[str, nnx.Module]:
    """The mixers and the experts, by what --mixer and --experts call them."""
    shape = {"group_size": GROUP, "num_experts": 4, "slots_per_expert": 4}
    return {
        "--mixer scan": Mamba(CHANNELS, rngs=nnx.Rngs(0)),
        "--mixer conv": GatedConv(CHANNELS, rngs=nnx.Rngs(0)),
        "--experts level1": HoME(CHANNELS, rngs=nnx.Rngs(0), num_experts_second=None, **shape),
        "--experts home": HoME(CHANNELS, rngs=nnx.Rngs(0), num_experts_second=8, **shape),
    }


def change(layer: nnx.Module) -> np.ndarray:
    """(SIDE, SIDE): how far the output of each voxel moves, as a part of the largest."""
    plane = jax.random.normal(jax.random.key(0), (1, 1, SIDE, SIDE, CHANNELS))
    moved = plane.at[0, 0, *CHANGED].add(1.0)
    shape = plane.shape if isinstance(layer, GatedConv) else (1, SIDE * SIDE, CHANNELS)
    one, other = (layer(volume.reshape(shape)).reshape(plane.shape) for volume in (plane, moved))
    distance = np.asarray(jnp.linalg.norm(other - one, axis=-1))[0, 0]
    return distance / distance.max()


def draw() -> None:
    """Write the picture: a panel a layer, darker where the output moves further, on a logarithmic scale."""
    panels = {name: change(layer) for name, layer in layers().items()}
    size = SIDE * VOXEL
    image = Image.new("RGB", (len(panels) * (size + GAP) + GAP, TOP + size + 12), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    for number, (name, values) in enumerate(panels.items()):
        left = GAP + number * (size + GAP)
        part = np.clip(1 - np.log(np.maximum(values, LOWEST)) / np.log(LOWEST), 0, 1)
        shade = np.stack([255 - part * (255 - channel) for channel in (0, 60, 120)], -1).astype(np.uint8)
        panel = Image.fromarray(shade).resize((size, size), Image.Resampling.NEAREST)
        image.paste(panel, (left, TOP))
        canvas.rectangle((left - 1, TOP - 1, left + size, TOP + size), outline=INK)
        row, column = CHANGED
        x, y = left + column * VOXEL, TOP + row * VOXEL
        canvas.rectangle((x, y, x + VOXEL - 1, y + VOXEL - 1), outline=RED, width=2)
        canvas.text((left, 6), name, INK, font)
    image.save(PICTURE, optimize=True)


if __name__ == "__main__":
    draw()
