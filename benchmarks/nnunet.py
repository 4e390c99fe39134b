"""nnU-Net for comparison, on a split that benchmarks/accuracy.py made: 3d_fullres as its planner plans it.

pip install nnunetv2==2.8.1
python benchmarks/accuracy.py --data ACDC --output_dir OUT --folds 2 --minutes 6.5 --runs plan
python benchmarks/nnunet.py --data OUT/fold_2 --output_dir NNUNET --seconds 390
python benchmarks/accuracy.py --data ACDC --output_dir OUT --folds 2 --minutes 6.5 --runs plan "nnU-Net:"

Trained on all cases of the split's train, with a polynomial rate over the seconds given (compilation included,
preprocessing not), not over 1,000 epochs; mirrored at inference, as is its default. Its label maps are scored by
`mambahome evaluate` into OUT/fold_2, where accuracy.py takes them as a run of its own. --planner
nnUNetPlannerResEncL takes its larger networks. --time_steps times steps on one batch, by nnU-Net's own train_step
(torch.compile, float16).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUMBER = 10
DATASET = f"Dataset{NUMBER:03d}_Benchmark"
CHANNEL = "_0000.nii.gz"
PLANS = {"ExperimentPlanner": "nnUNetPlans"} | {
    f"nnUNetPlannerResEnc{size}": f"nnUNetResEncUNet{size}Plans" for size in ("M", "L", "XL")
}


def write_raw(data: Path, folder: Path) -> list[Path]:
    """The split as nnU-Net wants it, in `folder`; the images that are not trained on."""
    shutil.rmtree(folder, ignore_errors=True)
    for source, name, suffix in (
        ("train/images", "imagesTr", CHANNEL),
        ("train/labels", "labelsTr", ".nii.gz"),
        ("test/images", "imagesTs", CHANNEL),
    ):
        (folder / name).mkdir(parents=True)
        paths = sorted((data / source).glob("*.nii.gz"))
        if not paths:
            raise SystemExit(f"{data / source}: no .nii.gz; expected a folder that benchmarks/accuracy.py wrote")
        for path in paths:
            shutil.copy(path, folder / name / (path.name.removesuffix(".nii.gz") + suffix))
    description = {
        "channel_names": {"0": "MRI"},
        "labels": structures(data),
        "numTraining": len(list((folder / "labelsTr").iterdir())),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return sorted((folder / "imagesTs").iterdir())


def structures(data: Path) -> dict[str, int]:
    """Name to label of the split's dataset.json, in either direction that it may be written in; else of the labels."""
    table = data / "train" / "dataset.json"
    if not table.exists():
        import nibabel
        import numpy as np

        paths = (data / "train" / "labels").glob("*.nii.gz")
        most = max(int(np.asarray(nibabel.load(path).dataobj).max()) for path in paths)
        return {"background": 0, **{f"label_{label}": label for label in range(1, most + 1)}}
    labels = json.loads(table.read_text())["labels"]
    # Written either way: name to label as nnU-Net does, label to name as the Medical Segmentation Decathlon does.
    named = {label: int(key) for key, label in labels.items()} if next(iter(labels)).isdigit() else labels
    return {"background": 0, **{name: label for name, label in named.items() if label}}


def time_steps(trainer, steps: int) -> dict[str, float]:
    """Milliseconds of steps on one batch that is taken from the loader and copied to the device once."""
    import torch

    batch = next(trainer.dataloader_train)
    batch["data"] = batch["data"].to(trainer.device)
    batch["target"] = [target.to(trainer.device) for target in batch["target"]]
    samples = []
    for _ in range(steps + 10):
        begun = time.perf_counter()
        trainer.train_step(batch)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - begun) * 1e3)
    samples = sorted(samples[10:])
    return {"ms": statistics.median(samples), "fastest": samples[0], "slowest": samples[-1]}


def score(args: argparse.Namespace, predictions: Path, seconds: dict[str, float], record: dict[str, Any]) -> None:
    """Evaluate as a run of accuracy.py's, with what it reads of one."""
    home = args.data / args.name.replace("-", "_") / f"seed_{args.seed}"
    (home / "run").mkdir(parents=True, exist_ok=True)
    (home / "run" / "run.json").write_text(json.dumps(record))
    (home / "seconds.json").write_text(json.dumps(seconds))
    (home.parent / "flags").write_text("")
    given = ["--predictions", predictions, "--references", args.data / "test" / "labels"]
    words = [args.mambahome_python, "-m", "mambahome_jax", "evaluate", *given, "--output_dir", home / "evaluation_best"]
    done = subprocess.run([str(word) for word in words], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    sys.stdout.flush()
    # Its workers wait for batches that nobody takes any more.
    os._exit(done.returncode)


def train(trainer, seconds: float) -> int:
    """The updates that were made in the seconds given."""
    begun, updates = time.monotonic(), 0
    while (spent := time.monotonic() - begun) < seconds:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - spent / seconds) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        updates += 1
        if updates % 250 == 0:
            print(f"{updates} updates in {spent:.0f} s", flush=True)
    return updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="fold_N of benchmarks/accuracy.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=390)
    parser.add_argument("--planner", default="ExperimentPlanner", choices=PLANS)
    parser.add_argument("--name", default="nnU-Net", help="of the run among those of accuracy.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time_steps", type=int, default=0, help="time so many steps instead of training")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mambahome_python", default=sys.executable, help="where nnU-Net lives in another environment")
    args = parser.parse_args()
    home = args.output_dir.resolve()
    for name in ("raw", "preprocessed", "results"):
        # Read when nnU-Net is imported.
        os.environ[f"nnUNet_{name}"] = str(home / name)
    test = write_raw(args.data, home / "raw" / DATASET)

    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    processes = min(16, os.cpu_count() or 1)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    extract_fingerprints([NUMBER], num_processes=processes, check_dataset_integrity=False)
    identifier = plan_experiments([NUMBER], experiment_planner_class_name=args.planner)
    preprocess([NUMBER], identifier, configurations=["3d_fullres"], num_processes=[processes])
    prepared = home / "preprocessed" / DATASET
    plans = json.loads((prepared / f"{PLANS[args.planner]}.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((prepared / "dataset.json").read_text())
    planned = plans["configurations"]["3d_fullres"]
    print(f"batch {planned['batch_size']} of {planned['patch_size']} voxels of {planned['spacing']} mm", flush=True)

    begun = time.monotonic()
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", dataset, torch.device(args.device))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.network.train()
    record = {"planned": {key: planned[key] for key in ("batch_size", "patch_size", "spacing")}}
    record["versions"] = {"torch": torch.__version__, "nnunetv2": "2.8.1"}
    record["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    if args.time_steps:
        record |= time_steps(trainer, args.time_steps)
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
        print(json.dumps(record), flush=True)
        os._exit(0)
    record["step"] = train(trainer, args.seconds)
    seconds = {"train": time.monotonic() - begun}
    record["seconds"] = seconds["train"]
    print(f"{record['step']} updates in {seconds['train']:.0f} s", flush=True)

    begun = time.monotonic()
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=args.device == "cuda")
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    predictions = home / "predictions"
    predictions.mkdir(exist_ok=True)
    results = [str(predictions / path.name.removesuffix(CHANNEL)) for path in test]
    predictor.predict_from_files_sequential([[str(path)] for path in test], results, overwrite=True)
    seconds["infer"] = time.monotonic() - begun
    score(args, predictions, seconds, record)


if __name__ == "__main__":
    main()
