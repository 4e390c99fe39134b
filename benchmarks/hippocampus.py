"""Train on hippocampus MRI as docs/how-to/train.md does, or with one ingredient changed, and score unseen cases.

python benchmarks/hippocampus.py --data TASK04 --output_dir OUT
python benchmarks/hippocampus.py --data TASK04 --output_dir OUT --runs ingredients --weights last --at_once 4
python benchmarks/hippocampus.py --data TASK04 --output_dir OUT --runs strong "mine: --recipe strong --steps 900" \
    --infer="--tta"

Every fifth case by name, from the third on (--fold 2), is taken out before preprocess.py and scored by infer.py and
`mambahome evaluate`. The differences are from the first run, over the cases, with bootstrap 95 % intervals. Runs that
are in OUT/fold_N already are not repeated, those that were stopped go on; the same name with other flags is refused.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.evaluation.results import compare_runs, read_evaluation

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "strong": "--recipe strong --model MambaHoME_small --mirror none --batch_size 8 --hold_out 0 --members 3 "
    "--max_minutes 8",
    "published": "--recipe published --patch_size 32 48 32 --batch_size 8 --hold_out 20 --max_minutes 8",
}
BASE = "--recipe strong --model MambaHoME_small --batch_size 8 --hold_out 20 --val_every 500 --steps 1800 --dropout 0"
INGREDIENTS = {
    "base": BASE,
    "not mirrored": f"{BASE} --mirror none",
    "no warm-up, no clipping": f"{BASE} --warmup_steps 0 --clip_norm 0",
    "no moving average": f"{BASE} --ema_decay 0",
    "not class-balanced": f"{BASE} --class_balanced False",
    "no deep supervision": f"{BASE} --deep_supervision False",
    "intensities unchanged": f"{BASE} --gamma_probability 0 --contrast_probability 0 --brightness_probability 0",
    "dropout": f"{BASE} --dropout 0.1",
    "SGD": f"{BASE} --optimizer SGD --lr 0.01 --weight_decay 3e-5",
    "published, moved": "--recipe published --batch_size 8 --hold_out 20 --val_every 500 --steps 1334 --lr 3e-4 "
    "--affine_probability 0.5 --zoom_probability 0 --rotate90_probability 0",
}


def split(data: Path, folder: Path, fold: int) -> None:
    """Links to the scans: folder/train and folder/test, each with images and labels."""
    for number, case in enumerate(sorted(load_dataset(data).cases, key=lambda case: case.id)):
        part = folder / ("test" if number % 5 == fold else "train")
        for kind, path in (("images", case.image), ("labels", case.label)):
            link = part / kind / f"{case.id}.nii.gz"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(path).resolve())


def command(log: Path, *words: str | Path, **environment: str) -> None:
    """Run one of the project's commands; what it prints goes into a file."""
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, *map(str, words)],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
        )


def run(name: str, flags: str, infer: str, folder: Path, weights: str, at_once: int) -> Path:
    """Train, infer, evaluate; the folder of the evaluation."""
    home = folder / name.replace(" ", "_").replace(",", "")
    which = "_".join([weights, *re.findall(r"\w+", infer)])
    evaluation = home / f"evaluation_{which}"
    home.mkdir(parents=True, exist_ok=True)
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.88 / at_once:.2f}"}
    training = home / "run"
    asked = home / "flags"
    if asked.exists() and asked.read_text() != flags:
        sys.exit(f"{home} is of other flags: {asked.read_text()}. Take another name or another --output_dir")
    if (evaluation / "metrics.csv").exists():
        return evaluation
    asked.write_text(flags)
    # Nothing is done where the run is finished.
    flags = ["--data_train", folder / "ready", "--output_dir", training, "--resume", *shlex.split(flags)]
    command(home / "train.log", ROOT / "train.py", *flags, **share)
    # One network, or those of --members.
    models = sorted(training.glob(f"**/checkpoints/{weights}"))
    predictions = home / f"predictions_{which}"
    flags = ["--data_path", folder / "test" / "images", "--output_dir", predictions, "--previews", "False"]
    flags += shlex.split(infer)
    command(home / "infer.log", ROOT / "infer.py", *flags, "--model_path", *models, **share)
    flags = ["--predictions", predictions, "--references", folder / "test" / "labels", "--output_dir", evaluation]
    command(home / "evaluate.log", "-m", "mambahome_jax", "evaluate", *flags, JAX_PLATFORMS="cpu")
    return evaluation


def print_table(names: Sequence[str], evaluations: Sequence[Path]) -> None:
    """Scores of each, and the differences from the first."""
    first = read_evaluation(evaluations[0]).scores
    for name, evaluation in zip(names, evaluations, strict=True):
        metrics = compare_runs(read_evaluation(evaluation).scores, first)["metrics"]
        dice, hd95 = metrics["dice"], metrics["hd95"]["overall"]
        each = " / ".join(f"{entry['mean']:.3f}" for entry in dice["structures"].values())
        low, high = dice["overall"]["low"], dice["overall"]["high"]
        print(
            f"{name:28s} Dice {each} / {dice['overall']['mean']:.4f}   HD95 {hd95['mean']:.2f} mm   "
            f"difference {dice['overall']['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the dataset as downloaded, or images and labels")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["commands"], help='commands, ingredients, names, "NAME: FLAGS"')
    parser.add_argument("--fold", type=int, default=2, choices=range(5), help="which fifth is not trained on")
    parser.add_argument("--infer", default="", help="flags of infer.py, as --infer='--tta'")
    parser.add_argument("--weights", default="best", choices=["best", "last"])
    parser.add_argument("--at_once", type=int, default=1, help="runs on the device at the same time")
    args = parser.parse_args()
    chosen: dict[str, str] = {}
    for word in args.runs:
        name, colon, flags = word.partition(":")
        if not colon and name not in {"commands", "ingredients", *COMMANDS, *INGREDIENTS}:
            parser.error(f"no run {name!r}; expected commands, ingredients, {', '.join(COMMANDS | INGREDIENTS)}")
        known = COMMANDS | INGREDIENTS
        chosen |= {"commands": COMMANDS, "ingredients": INGREDIENTS}.get(word) or {
            name: flags if colon else known[name]
        }
    args.output_dir /= f"fold_{args.fold}"
    split(args.data, args.output_dir, args.fold)
    if not (args.output_dir / "ready" / "dataset.json").exists():
        flags = ["--input_path", args.output_dir / "train", "--output_path", args.output_dir / "ready"]
        flags += ["--spacing", "1", "1", "1", "--modality", "mr"]
        command(args.output_dir / "preprocess.log", ROOT / "preprocess.py", *flags, JAX_PLATFORMS="cpu")
    with ThreadPoolExecutor(args.at_once) as pool:
        started = [
            pool.submit(run, name, flags, args.infer, args.output_dir, args.weights, args.at_once)
            for name, flags in chosen.items()
        ]
        print_table([*chosen], [future.result() for future in started])


if __name__ == "__main__":
    main()
