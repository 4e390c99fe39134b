"""Time a trained model folder of nnU-Net on a synthetic CT, file to file, here and by nnunetv2's own predictor.

python benchmarks/nnunet_folder.py --json nnunet_folder.json             # mambahome infer, twice: the first compiles
pip install nnunetv2==2.8.1
python benchmarks/nnunet_folder.py --official --json nnunet_folder.json  # nnUNetv2_predict_from_modelfolder too

The network is the default one of 3d_fullres (PlainConvUNet, patch 128^3, 32 to 320 channels) with random weights, in a
folder as nnU-Net writes it. --official also counts the voxels on which the two disagree: few, though next to ties of
random logits float16 and bf16 decide otherwise.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from figures import tell
from flax import nnx
from infer_memory import ROOT, run_measured
from infer_volume import make_scan

from mambahome_jax.config import DataProperties, PlainUNetConfig
from mambahome_jax.imaging.nnunet import NnunetPreparation
from mambahome_jax.imaging.normalisation import PerChannel
from mambahome_jax.imaging.volume import read_labels
from mambahome_jax.model.networks import make_network
from mambahome_jax.weights.nnunet import CHECKPOINT, DATASET, PLANS
from mambahome_jax.weights.weights import export_official, read_weights, write_weights

PATCH = (128, 128, 128)


def plans_of(config: PlainUNetConfig, spacing: list[float]) -> dict[str, Any]:
    """plans.json of one channel of CT in the axes z, y, x; spacing: mm."""
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset999_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [400, 512, 512],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 40.0, "median": 40.0, "std": 60.0, "min": -1000.0, "max": 1000.0}
            | {"percentile_00_5": -160.0, "percentile_99_5": 240.0}
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(PATCH),
                "median_image_size_in_voxels": [400.0, 512.0, 512.0],
                "spacing": spacing,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                **{
                    f"resampling_fn_{what}": "resample_data_or_seg_to_shape"
                    for what in ("data", "seg", "probabilities")
                },
                "resampling_fn_data_kwargs": resampling | {"order": 3},
                "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {
                        "n_stages": len(config.feat_size),
                        "features_per_stage": config.feat_size,
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": config.kernel_sizes,
                        "strides": [(1, 1, 1), *config.strides],
                        "n_conv_per_stage": config.depths,
                        "n_conv_per_stage_decoder": config.decoder_depths,
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
                "batch_dice": False,
            }
        },
    }


def write_folder(folder: Path, classes: int, spacing: list[float]) -> None:
    """A model folder of random weights."""
    config = PlainUNetConfig(in_chans=1, out_chans=classes)
    labels = {"background": 0} | {f"structure_{value}": value for value in range(1, classes)}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "fold_0").mkdir(parents=True)
    (folder / PLANS).write_text(json.dumps(plans_of(config, spacing)))
    (folder / DATASET).write_text(json.dumps(dataset))
    network = make_network(config, rngs=nnx.Rngs(0), precision="fp32")
    # Of it the checkpoint needs the names and mirrors alone; the rest stands in the plans.
    preparation = NnunetPreparation((2, 1, 0), PerChannel(()), mirror_axes=(0, 1, 2))
    data = DataProperties(nnunet=preparation).to_json()
    bare = folder / "weights.npz"
    text = json.dumps({"model": config.to_json(), "data": data})
    np.savez(bare, allow_pickle=False, config_json=np.asarray(text), **export_official(network))
    write_weights(folder / "fold_0" / CHECKPOINT, read_weights(bare))
    bare.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 400], help="of the scan, voxels x, y, z")
    parser.add_argument("--voxel", nargs=3, type=float, default=[0.8, 0.8, 1.0], help="of the scan, mm")
    parser.add_argument("--spacing", nargs=3, type=float, default=[1.0, 0.8, 0.8], help="of the network, mm z, y, x")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--tta", action="store_true", help="eight mirrored windows, the default of nnU-Net")
    parser.add_argument("--sw_batch_size", type=int, default=4)
    parser.add_argument("--precision", choices=["bf16", "tf32", "fp32"])
    parser.add_argument("--official", action="store_true", help="run nnunetv2's predictor too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        scans, model = home / "scans", home / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        make_scan(scans / "scan_0000.nii.gz", tuple(args.shape), tuple(args.voxel))
        write_folder(model, args.classes, args.spacing)
        command = [sys.executable, str(ROOT / "infer.py"), "--data_path", str(scans), "--model_path", str(model)]
        command += ["--sw_batch_size", str(args.sw_batch_size), *(["--tta"] if args.tta else [])]
        command += ["--precision", args.precision] if args.precision else []
        for run in ("first", "second"):
            measured[run] = run_measured([*command, "--output_dir", str(home / run)])
            print(f"mambahome infer, {run} run: {measured[run]}", flush=True)
        if args.official:
            command = ["nnUNetv2_predict_from_modelfolder", "-i", str(scans), "-o", str(home / "official")]
            command += ["-m", str(model), "-f", "0", *([] if args.tta else ["--disable_tta"])]
            command += ["-device", "cuda" if jax.default_backend() == "gpu" else "cpu"]
            measured["nnunetv2"] = run_measured(command)
            ours, theirs = (read_labels(home / run / "scan.nii.gz").array for run in ("second", "official"))
            measured["labels_that_differ"] = float(np.mean(ours != theirs))
            measured["times_as_fast"] = measured["nnunetv2"]["seconds"] / measured["second"]["seconds"]
    tell(args, **measured)


if __name__ == "__main__":
    main()
