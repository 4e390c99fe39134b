"""Draw the README's picture: what the demo's network finds in a synthetic scan that it has not seen.

mambahome demo --output_dir demo && python docs/getting-started/picture.py demo
"""

import json
import sys
from pathlib import Path

from mambahome_jax.imaging.pictures import render
from mambahome_jax.imaging.volume import read_labels, read_volume

PICTURE = Path(__file__).with_name("result.png")


def draw(demo: Path) -> None:
    """Write result.png for the first case of a demo's predictions, in few colours to keep it small."""
    prediction = min((demo / "predictions").glob("*.nii.gz"))
    names = json.loads((demo / "predictions" / "run.json").read_text(encoding="utf-8"))["labels"]
    picture = render(
        read_volume(demo / "unseen" / "images" / prediction.name),
        read_labels(prediction),
        {int(value): name.replace("_", " ") for value, name in names.items()},
        "ct",
        "Mamba-HoME on a synthetic CT scan that took no part in its training",
    )
    picture.quantize(colors=128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
