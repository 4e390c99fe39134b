"""Mistakes that a type checker must find: mypy refuses an ignore without an error (pyproject.toml); never run."""

import numpy as np
from flax import nnx

import mambahome_jax as mh

mh.train(data_train="prepared", batch_sise=2)  # type: ignore[call-arg]
mh.train(data_train="prepared", batch_size="2")  # type: ignore[arg-type]
mh.train(data_train="prepared", model="MambaHome")  # type: ignore[arg-type]
mh.train()  # type: ignore[call-arg]
mh.infer("scans", "run")  # type: ignore[call-arg, arg-type]
mh.infer(data_path="scans", model_path="run").scores  # type: ignore[attr-defined]
mh.check(folder="scans", progress="yes")  # type: ignore[arg-type]
mh.plan(folder="scans", progress=True)  # type: ignore[call-arg]
mh.read_volume("scan.nii.gz").voxels  # type: ignore[attr-defined]
mh.reorient("scan.nii.gz", "RAS")  # type: ignore[arg-type]
mh.resample(mh.read_volume("scan.nii.gz"), (1, 1, 1), order="bilinear")  # type: ignore[arg-type]
mh.segment(mh.load_model("run"), mh.read_volume("scan.nii.gz"), overlapp=0.5)  # type: ignore[call-arg]
mh.segment(mh.load_model("run"), np.zeros((8, 8, 8)))  # type: ignore[arg-type]
mh.MambaHoME.of_size("huge", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
mh.PlainUNet(1, 3, rngs=nnx.Rngs(0), features=(8, 16))  # type: ignore[call-arg]
mh.Mamba(32)  # type: ignore[call-arg]
mh.hd95(np.zeros((8, 8, 8)), np.zeros((8, 8, 8)), 1)  # type: ignore[call-arg]
mh.write_volume("out.nii.gz", np.zeros((8, 8, 8)))  # type: ignore[arg-type]
mh.show(mh.read_volume("scan.nii.gz"), names=["liver"])  # type: ignore[arg-type]
mh.predict  # type: ignore[attr-defined]
