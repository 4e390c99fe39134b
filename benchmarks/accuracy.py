"""Train, infer and score cases that took no part, with settings compared over seeds at the same minutes of clock.

python benchmarks/accuracy.py --data ACDC --output_dir OUT --leave_out patient076 --minutes 4 --at_once 3 \
    --runs plan "3.3 mm: --spacing 1.5 1.5 3.3 -- --model MambaHoME_small --patch_size 160 160 32 --mirror none"
python benchmarks/accuracy.py --data TASK04 --output_dir OUT --minutes 8 --runs command published
python benchmarks/accuracy.py --data TASK04 --output_dir OUT --runs ingredients --weights last --at_once 4

Every fifth patient by name, from the third on (--folds 2), is taken out before preprocess.py and scored by infer.py and
`mambahome evaluate`; of several folds the cases are scored together. A run is "NAME: flags of preprocess -- flags of
train -- flags of infer", or a name of RUNS; "plan" gives paths only. A case's score is the mean over the seeds; the
differences are from the first run, with intervals from drawing cases and seeds anew, and Wilcoxon's p over the cases.
A run of which something fails has no row. Runs that are in OUT/fold_N already are not repeated, those that were stopped
go on; the same name with other flags is refused.
"""

import argparse
import itertools
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.evaluation.results import read_evaluation, structures_of, wilcoxon_p
from mambahome_jax.evaluation.systems import paired_interval, score_array
from mambahome_jax.support.devices import versions
from mambahome_jax.support.files import jsonable

ROOT = Path(__file__).parents[1]
HIPPOCAMPUS = "--spacing 1 1 1 --modality mr -- --batch_size 8"
BASE = f"{HIPPOCAMPUS} --recipe strong --model MambaHoME_small --hold_out 20 --val_every 500 --steps 1800 --dropout 0"
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
    "published, moved": f"{HIPPOCAMPUS} --recipe published --hold_out 20 --val_every 500 --steps 1334 --lr 3e-4 "
    "--affine_probability 0.5 --zoom_probability 0 --rotate90_probability 0",
}
# The best commands that are known for a dataset, written out.
RUNS = INGREDIENTS | {
    "plan": "",
    "command": f"{HIPPOCAMPUS} --recipe strong --model MambaHoME_small --mirror none --hold_out 0 --members 3",
    "published": f"{HIPPOCAMPUS} --recipe published --patch_size 32 48 32 --hold_out 20",
    "left atrium": "-- --recipe strong --model MambaHoME_small --patch_size 112 112 80 --batch_size 4 --hold_out 0",
    "3.3 mm": "--spacing 1.5 1.5 3.3 -- --recipe strong --model MambaHoME_small --patch_size 160 160 32 --mirror none "
    "--strides published --hold_out 0",
}
# Standard deviation that the seed alone gives the mean Dice of some 80 cases (docs/experiments/hippocampus.md).
SEED_NOISE = 0.002


class Failed(Exception):
    """One of the project's commands did not do all that it was asked."""


@dataclass(frozen=True)
class Run:
    """Flags of one setting."""

    name: str
    flags: str

    def part(self, number: int) -> list[str]:
        """The flags of preprocess (0), train (1) or infer (2)."""
        parts = [part.strip() for part in re.split(r"(?:^|\s)--(?:\s|$)", self.flags)]
        return shlex.split(parts[number]) if number < len(parts) else []


def split(data: Path, folder: Path, fold: int, leave_out: Sequence[str]) -> dict[str, int]:
    """Links to the scans: folder/train and folder/test, each with images and labels; how many cases each has."""
    cases = [case for case in load_dataset(data).cases if case.patient not in leave_out]
    patients = {name: number for number, name in enumerate(sorted({case.patient for case in cases}))}
    count = {"train": 0, "test": 0}
    for case in cases:
        part = "test" if patients[case.patient] % 5 == fold else "train"
        count[part] += 1
        for kind, path in (("images", case.image), ("labels", case.label)):
            link = folder / part / kind / f"{case.id}.nii.gz"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(path).resolve())
    table = data / "dataset.json"
    if table.exists():
        for part in count:  # the names of the structures, without a list of cases
            (folder / part / "dataset.json").write_text(json.dumps({"labels": json.loads(table.read_text())["labels"]}))
    return count


def command(log: Path, *words: str | Path, **environment: str) -> float:
    """Run one of the project's commands; what it prints goes into a file. The seconds it took."""
    begun = time.perf_counter()
    with log.open("w") as file:
        given = {"env": os.environ | environment, "stdout": file, "stderr": subprocess.STDOUT}
        done = subprocess.run([sys.executable, *map(str, words)], **given)
    if done.returncode:
        raise Failed(f"exit code {done.returncode}; see {log}")
    return time.perf_counter() - begun


def prepare(run: Run, folder: Path) -> Path:
    """Preprocess as the run asks, once for all runs that ask for the same; the folder of it."""
    flags = run.part(0)
    ready = folder / f"ready_{zlib.crc32(shlex.join(flags).encode()):08x}"
    if not (ready / "dataset.json").exists():
        given = ["--input_path", folder / "train", "--output_path", ready, *flags]
        command(folder / f"{ready.name}.log", ROOT / "preprocess.py", *given)
    return ready


def score(run: Run, seed: int, folder: Path, args: argparse.Namespace, ready: Path, slots: queue.Queue) -> Path:
    """Train, infer, evaluate with one seed on the split in `folder`; the folder of the evaluation."""
    home = folder / file_name(run.name) / f"seed_{seed}"
    evaluation = home / f"evaluation_{args.weights}"
    if (evaluation / "metrics.csv").exists():
        return evaluation
    home.mkdir(parents=True, exist_ok=True)
    slot = slots.get()
    try:
        flags = run.part(1)
        timed = not {"--steps", "--epochs", "--max_minutes"} & {*flags}
        flags += ["--max_minutes", f"{args.minutes:g}"] if timed and args.minutes else []
        training = home / "run"
        # Nothing is done where the run is finished.
        given = ["--data_train", ready, "--output_dir", training, "--seed", str(seed), "--resume", *flags]
        seconds = {"train": command(home / "train.log", ROOT / "train.py", *given, **slot)}
        # One network, or those of --members.
        models = sorted(training.glob(f"**/checkpoints/{args.weights}"))
        predictions = home / f"predictions_{args.weights}"
        given = ["--data_path", folder / "test" / "images", "--output_dir", predictions, "--previews", "False"]
        given += [*run.part(2), "--model_path", *models]
        seconds["infer"] = command(home / "infer.log", ROOT / "infer.py", *given, **slot)
    finally:
        slots.put(slot)
    given = ["--predictions", predictions, "--references", folder / "test" / "labels"]
    given += ["--output_dir", evaluation]
    command(home / "evaluate.log", "-m", "mambahome_jax", "evaluate", *given, JAX_PLATFORMS="cpu")
    (home / "seconds.json").write_text(json.dumps(seconds))
    return evaluation


def file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def matrices(folds: Sequence[Sequence[Path]], metric: str) -> tuple[np.ndarray, list[str], list[str]]:
    """(seeds, cases, structures) of a metric over evaluations of each fold, and the names of cases and structures."""
    scores = [[read_evaluation(folder).scores for folder in seeds] for seeds in folds]
    structures = structures_of(row for seeds in scores for row in seeds[0])
    cases = [sorted({row.case for row in seeds[0]}) for seeds in scores]
    parts = [score_array(seeds, metric, names, structures) for seeds, names in zip(scores, cases, strict=True)]
    return np.concatenate(parts, axis=1), [*itertools.chain.from_iterable(cases)], structures


def account(run: Run, folds: Sequence[Sequence[Path]], first: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
    """What a run reached, its differences from the first, and its Dice (seeds, cases)."""
    dice, cases, structures = matrices(folds, "dice")
    each = np.nanmean(dice, axis=2)
    row: dict[str, Any] = {"run": run.name, "flags": run.flags, "cases": cases}
    row |= {"dice": float(each.mean()), "dice_of_seeds": each.mean(axis=1).tolist()}
    row["structures"] = dict(zip(structures, np.nanmean(dice, axis=(0, 1)).tolist(), strict=True))
    row["hd95"] = float(np.nanmean(matrices(folds, "hd95")[0]))
    row["dice_of_cases"] = each.mean(axis=0).tolist()
    evaluations = [path for seeds in folds for path in seeds]
    row["seconds"] = [json.loads((path.parent / "seconds.json").read_text()) for path in evaluations]
    row["trained"] = [trained(path.parent / "run") for path in evaluations]
    if first is not None:
        difference = each.mean(axis=0) - first.mean(axis=0)
        row |= {"difference": float(difference.mean()), "p": wilcoxon_p(difference)}
        row["low"], row["high"] = paired_interval(each, first)
    return row, each


def trained(run: Path) -> dict[str, Any]:
    """What a training was given and how far it came, of its run.json; of several networks in one run, the first."""
    reports = sorted(run.glob("**/run.json"), key=lambda path: len(path.parts), reverse=True)
    report = json.loads(reports[0].read_text())
    keys = ("step", "seconds", "status", "best", "device", "training", "model", "versions", "git")
    return {key: report.get(key) for key in keys}


def print_row(row: dict[str, Any]) -> None:
    structures = " / ".join(f"{value:.3f}" for value in row["structures"].values())
    steps = ", ".join(str(entry["step"]) for entry in row["trained"])
    line = f"{row['run']:24s} Dice {structures} / {row['dice']:.4f}  HD95 {row['hd95']:.2f} mm  steps {steps}"
    if "difference" in row:
        line += f"  difference {row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) p {row['p']:.2g}"
    print(line, flush=True)


def gpus() -> list[str]:
    """Numbers of the GPUs that may be used; one empty name on a CPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name] or [""]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [""]
    return [str(number) for number in range(len(done.stdout.splitlines()))]


def chosen_runs(words: Sequence[str]) -> list[Run]:
    """The runs that words name or write out. Exits where there is none of a name."""
    runs = []
    for word in words:
        name, colon, flags = word.partition(":")
        if not colon and name not in {"ingredients", *RUNS}:
            sys.exit(f'no run {name!r}; expected ingredients, {", ".join(RUNS)}, or "NAME: FLAGS"')
        named = INGREDIENTS if word == "ingredients" else {name: flags.strip() if colon else RUNS[name]}
        runs += [Run(*item) for item in named.items()]
    return runs


def claim(run: Run, folder: Path) -> None:
    """Note a run's flags in its folder. Exits where there are results of other flags."""
    asked = folder / file_name(run.name) / "flags"
    asked.parent.mkdir(parents=True, exist_ok=True)
    if asked.exists() and asked.read_text() != run.flags:
        sys.exit(f"{asked.parent} is of other flags: {asked.read_text()}. Take another name or another --output_dir")
    asked.write_text(run.flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the dataset as downloaded, or images and labels")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["plan"], help='ingredients, names, "NAME: FLAGS"')
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="of each training that no flag gives a length")
    parser.add_argument("--folds", type=int, nargs="+", default=[2], choices=range(5), help="fifths not trained on")
    parser.add_argument("--leave_out", nargs="*", default=[], help="patients on neither side")
    parser.add_argument("--weights", default="best", choices=["best", "last"])
    parser.add_argument("--at_once", type=int, default=1, help="runs on each GPU at the same time")
    parser.add_argument("--json", type=Path, help="OUT/accuracy.json unless given")
    args = parser.parse_args()
    runs, folders = chosen_runs(args.runs), [args.output_dir / f"fold_{fold}" for fold in args.folds]
    for folder, run in itertools.product(folders, runs):
        claim(run, folder)
    counts = [split(args.data, folder, fold, args.leave_out) for folder, fold in zip(folders, args.folds, strict=True)]
    count = {part: sum(found[part] for found in counts) for part in counts[0]}
    apart = 2 * SEED_NOISE * (2 / args.seeds) ** 0.5
    print(
        f"{count['train']} cases to train on, {count['test']} to score; {args.seeds} seeds. Seeds alone move a mean by"
    )
    print(f"about {SEED_NOISE}: below {apart:.4f} a difference of two runs says nothing", flush=True)
    slots: queue.Queue = queue.Queue()
    for _ in range(args.at_once):
        for gpu in gpus():
            share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.88 / args.at_once:.2f}"}
            slots.put(share | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}))
    ready = {(run, folder): prepare(run, folder) for folder in folders for run in runs}
    with ThreadPoolExecutor(slots.qsize()) as pool:
        # All runs of a seed first: what was begun together is of all runs.
        jobs = list(itertools.product(range(args.seeds), folders, runs))
        started = {
            (run, folder, seed): pool.submit(score, run, seed, folder, args, ready[run, folder], slots)
            for seed, folder, run in jobs
        }
        done, failed = {}, set()
        for job, future in started.items():
            try:
                done[job] = future.result()
            except Failed as error:
                failed.add(job[0])
                print(f"{job[0].name} has no row: {job[1].name}, seed {job[2]}: {error}", flush=True)
    rows, first = [], None
    for run in (run for run in runs if run not in failed):
        folds = [[done[run, folder, seed] for seed in range(args.seeds)] for folder in folders]
        row, each = account(run, folds, first)
        first = each if first is None else first
        rows.append(row)
        print_row(row)
    given = {key: value for key, value in vars(args).items() if key not in ("data", "output_dir", "json")}
    about = {"versions": versions(("jax", "flax", "mambahome-jax")), "cases": count, "arguments": given}
    about["failed"] = [run.name for run in runs if run in failed]
    found = jsonable({"about": about, "rows": rows})
    (args.json or args.output_dir / "accuracy.json").write_text(json.dumps(found, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
