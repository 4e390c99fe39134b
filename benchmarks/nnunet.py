"""nnU-Net on the hippocampus, for comparison: default plans, 3d_fullres, on the split of benchmarks/accuracy.py.

pip install nnunetv2==2.8.1
python benchmarks/nnunet.py --data OUT/fold_1 --output_dir NNUNET

OUT/fold_1 is what accuracy.py wrote. Trained on all cases of its train, with a polynomial rate over the seconds
given (compilation included, preprocessing not), not over 1,000 epochs; mirrored at inference, as is its default.
Then `mambahome evaluate` of NNUNET/predictions.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

DATASET = "Dataset004_Hippocampus"
CHANNEL = "_0000.nii.gz"


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
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(list((folder / "labelsTr").iterdir())),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return sorted((folder / "imagesTs").iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="fold_N of benchmarks/accuracy.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420)
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

    extract_fingerprints([4], num_processes=8, check_dataset_integrity=False)
    plan_experiments([4])
    preprocess([4], configurations=["3d_fullres"], num_processes=[8])
    prepared = home / "preprocessed" / DATASET
    plans, dataset = (json.loads((prepared / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    plans["continue_training"] = False

    trainer = nnUNetTrainer(plans, "3d_fullres", "all", dataset, torch.device("cuda"))
    trainer.disable_checkpointing = True
    begun, updates = time.monotonic(), 0
    trainer.on_train_start()
    trainer.network.train()
    while (spent := time.monotonic() - begun) < args.seconds:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - spent / args.seconds) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        updates += 1
    print(f"{updates} updates in {time.monotonic() - begun:.0f} s", flush=True)

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    predictor = nnUNetPredictor(device=trainer.device)
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
    # Its workers wait for batches that nobody takes any more.
    os._exit(0)


if __name__ == "__main__":
    main()
