"""Arguments that cannot be meant are refused by errors of the project, not by what fails in its depths."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax import flags

WRONG = (
    None,
    "x",
    b"x",
    -1,
    2.5,
    float("nan"),
    [],
    ["x"],
    {},
    object(),
    np.zeros((2, 2)),
    np.array("x"),
    Path("x"),
)
SCAN = mh.Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
MAP = mh.Volume(np.ones((4, 4, 4), np.uint8), np.eye(4))
TWO = {"prediction": MAP.array, "reference": MAP.array, "classes": 1, "spacing": (1, 1, 1)}
LAYER = {"dim": 8, "rngs": nnx.Rngs(0)}
UNET = {"depths": (1, 1), "feat_size": (4, 8), "strides": ((2, 2, 2),), "kernel_sizes": ((3, 3, 3),) * 2}
UNET |= {"in_chans": 1, "out_chans": 2, "rngs": nnx.Rngs(0), "decoder_depths": (1,), "nonsense": 3}
WINDOWS = {"roi_size": (4, 4, 4), "overlap": 0.5, "sw_batch_size": 1, "progress": None}
GIVEN = {
    "Volume": {"array": SCAN.array, "affine": np.eye(4)},
    "reorient": {"volume": SCAN, "orientation": "LPS"},
    "resample": {"volume": SCAN, "spacing": (1, 1, 2), "order": "linear"},
    "resample_to": {"volume": SCAN, "affine": np.eye(4), "shape": (2, 2, 2), "order": "linear"},
    "volumes_ml": {"labels": MAP, "names": {1: "a"}},
    "show": {"volume": SCAN, "labels": MAP, "names": {1: "a"}},
    "read_volume": {"path": "none.nii.gz", "channels": 1, "series": (), "spacing_scale": None},
    "read_labels": {"path": "none.nii.gz"},
    "write_volume": {"path": "x.nii.gz", "volume": MAP, "names": {1: "a"}},
    "dice": TWO,
    "hd95": TWO | {"surface": "voxels"},
    "assd": TWO | {"surface": "voxels"},
    "nsd": TWO | {"surface": "voxels", "tolerance_mm": 1.0},
    "dice_ce": {"logits": jnp.zeros((1, 2, 2, 2, 3)), "labels": jnp.zeros((1, 2, 2, 2), int), "labelled": None},
    "sliding_window": {"predict": np.asarray, "image": SCAN.array[..., None], "mode": "constant", **WINDOWS},
    "segment": {"model": np.asarray, "volume": SCAN, "devices": None, "spacing": None, "modality": "mr", **WINDOWS},
    "load_model": {"path": "none", "precision": None},
    "export_official": {"tree": {}},
    "Mamba": {"d_model" if name == "dim" else name: value for name, value in LAYER.items()},
    "BiMamba": {"d_model" if name == "dim" else name: value for name, value in LAYER.items()},
    "HoME": LAYER | {"group_size": 8},
    "SoftMoE": LAYER | {"num_experts": 2},
    "Numerics": {"precision": "fp32"},
    "MambaHoME": {"config": mh.MODEL_SIZES["MambaHoME_tiny"].model, "rngs": nnx.Rngs(0), "precision": "none"},
    "SegMamba": UNET,
    "PlainUNet": UNET,
    "ResEncUNet": UNET,
    "ModelConfig": {"in_chans": 1, "depths": (1,) * 4, "mixer": "scan"},
    "DataProperties": {"spacing": (1, 1, 1), "orientation": "RAS", "modality": "ct", "labels": ((1, "a"),)},
    "train": {"data_train": "none", "callbacks": ()},
}
# Made by others, or flags alone, which test_keywords.py has.
RESULTS = re.compile(r".*(Error|Warning|ed|Result)$|FolderPlan|Callback|Validation|MODEL_SIZES|__version__")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in dir(mh) if not RESULTS.fullmatch(name)])
def test_wrong_arguments_are_refused_in_our_words(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = GIVEN.get(name)
    if given is None:
        assert hasattr(flags, f"{name.capitalize()}Config"), f"add what {name} takes to GIVEN"
        return
    function = getattr(mh, name)
    for argument in given:
        for wrong in WRONG:
            try:
                function(**{**given, argument: wrong})
            except mh.MambaHomeError:
                pass
            except Exception as error:  # noqa: BLE001
                pytest.fail(f"{name}({argument}={wrong!r}): {type(error).__name__}: {error}")
