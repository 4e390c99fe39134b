"""demo: synthetic scans through the whole program, each step by the command line that a user would type."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mambahome_jax.datasets.phantom import write_phantoms
from mambahome_jax.errors import OutputError
from mambahome_jax.flags import DemoConfig
from mambahome_jax.support.console import command_line, counted

# Coarse, so that a patch covers most of a body and nearly every step sees every structure.
SPACING = "6 6 6"
# Little time and no variation to speak of: no augmentation, and every structure as often as the others. Half as wide
# again as the smallest size, which in so few steps misses the kidneys with some seeds.
TRAINING = (
    "--recipe published --patch_size 48 32 32 --feature_size 12 --batch_size 1 --lr 2e-3 --class_balanced "
    "--augment False"
)
# As many windows as validation takes at a time: inference then finds the network compiled.
INFERENCE = "--sw_batch_size 1"


def run(config: DemoConfig) -> int:
    """Write phantoms, then preprocess, train, infer and evaluate; returns the first exit code that is not 0.

    Raises OutputError where the folder cannot be written or holds something else.
    """
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    folder = config.output_dir
    _clear(folder)
    raw, unseen = folder / "scans", folder / "unseen"
    references = unseen / "labels"
    console.print(f"Writing {config.train_cases + config.test_cases} synthetic abdominal CT scans to {folder}")
    write_phantoms(raw, config.train_cases, seed=config.seed)
    write_phantoms(unseen, config.test_cases, seed=config.seed, first=config.train_cases + 1)
    ready, trained = folder / "preprocessed", folder / "run"
    predicted, scored = folder / "predictions", folder / "evaluation"
    training = ["--model", "MambaHoME_tiny", "--steps", str(config.steps), *TRAINING.split()]
    training += ["--val_every", str(config.steps), "--max_val_cases", "2", "--seed", str(config.seed)]
    inference = ["--model_path", str(trained / "checkpoints" / "last"), *INFERENCE.split()]
    steps = [
        ["preprocess", "--input_path", str(raw), "--output_path", str(ready), "--spacing", *SPACING.split()],
        ["train", "--data_train", str(ready), "--output_dir", str(trained), *training],
        ["infer", "--data_path", str(unseen / "images"), *inference, "--output_dir", str(predicted)],
        ["evaluate", "--predictions", str(predicted), "--references", str(references), "--output_dir", str(scored)],
    ]
    for arguments in steps:
        console.print(f"\n[bold]$ {escape(command_line(*arguments))}[/bold]")
        code = subprocess.run([sys.executable, "-m", "mambahome_jax", *arguments], check=False).returncode
        if code:
            return code
    mean = json.loads((scored / "summary.json").read_text(encoding="utf-8"))["mean"]["dice"]
    picture = sorted((predicted / "previews").glob("*.png"))[0].resolve()
    console.print(f"\nMean Dice {mean:.3f} on {counted(config.test_cases, 'unseen scan')}.", end=" ")
    console.print(f"Everything took {time.perf_counter() - started:.0f} s.\nA picture of the first: {picture}")
    console.print(f"Next, with scans of your own: {command_line('check', 'SCANS')}")
    return 0


def _clear(folder: Path) -> None:
    """Remove what an earlier demo wrote, and only that."""
    marker = folder / ".mambahome-demo"
    try:
        if folder.exists() and not marker.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds files that no demo wrote; expected a new folder. Pass --output_dir")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error}). Pass another --output_dir") from error
