"""Writes what runs_86784e3.zip holds. Run with the code of commit 86784e3, then zip what it wrote.

Three raw cases, their prepared folder, and a run a recipe whose checkpoints are of step 2 of 4, each array one number.
"""

import json
from pathlib import Path

import jax
import numpy as np

from mambahome_jax import cli
from mambahome_jax.imaging.volume import Volume, write_volume
from mambahome_jax.training import checkpoints

HOME = Path("made")
TRAINING = "--model MambaHoME_tiny --feature_size 12 --patch_size 32 32 32 --batch_size 1 --steps 4 --val_every 2"


def write_cases(folder: Path) -> None:
    for number in range(3):
        grid = np.indices((40, 36, 34)).astype(float)
        label = np.zeros((40, 36, 34), np.uint8)
        for value, centre in ((1, (14, 18, 17)), (2, (27 - number, 18, 17))):
            label[sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < 36] = value
        image = np.where(grid[0] < 4, -1000, label.astype(np.int16) * 60 - 20 + 10 * number).astype(np.int16)
        affine = np.diag([-1.0, -1.0, 2.0, 1.0])
        write_volume(folder / "images" / f"case_{number}.nii.gz", Volume(image, affine))
        write_volume(folder / "labels" / f"case_{number}.nii.gz", Volume(label, affine))
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))


def keep_step_2_as_numbers() -> None:
    save = checkpoints.CheckpointWriter.save

    def constant(self, folder, state, *rest, **more):
        if int(state.step) > 2:
            return None
        leaves, tree = jax.tree.flatten(state)
        leaves = [
            jax.device_put(np.full(leaf.shape, (n % 97 + 1) / 128, leaf.dtype), leaf.sharding) if leaf.ndim else leaf
            for n, leaf in enumerate(leaves)
        ]
        return save(self, folder, jax.tree.unflatten(tree, leaves), *rest, **more)

    checkpoints.CheckpointWriter.save = constant


def main() -> None:
    write_cases(HOME / "raw")
    keep_step_2_as_numbers()
    folders = ["--input_path", str(HOME / "raw"), "--output_path", str(HOME / "ready")]
    cli.run_command("preprocess", [*folders, "--spacing", "1", "1", "2"], "mambahome preprocess")
    for recipe in ("published", "strong"):
        folders = ["--data_train", str(HOME / "ready"), "--output_dir", str(HOME / recipe)]
        flags = [*TRAINING.split(), "--recipe", recipe, "--augment", "False"]
        cli.run_command("train", [*folders, *flags], "mambahome train")


if __name__ == "__main__":
    main()
