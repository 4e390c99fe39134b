"""What a user writes with each public name; mypy checks it strictly (pyproject.toml), it is never run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import mambahome_kernels as kernels
import numpy as np
from flax import nnx

import mambahome_jax as mh

rngs = nnx.Rngs(0)
checked: mh.Checked = mh.check(folder="scans", fast=True, progress=True)
planned: mh.FolderPlan = mh.plan(folder=Path("scans"), memory=24.0)
prepared: mh.Preprocessed = mh.preprocess(input_path=["a", "b"], output_path="prepared", spacing=(0, 0, 0))
trained: mh.TrainResult = mh.train(data_train="prepared", model="MambaHoME_tiny", patch_size=[48, 48, 48], lr=1e-3)
inferred: mh.Inferred = mh.infer(data_path="scans", model_path=trained.folder, labels=["liver"], progress=True)
evaluated: mh.Evaluated = mh.evaluate(predictions=inferred.output_dir, references="labels", output_dir="eval")
reported: mh.Reported = mh.report(evaluation=evaluated.output_dir)
compared: mh.DuelResult = mh.duel(folder="prepared", against=["SegMamba"], seeds=3)
exported: mh.Exported = mh.export(model=trained.folder, destination="model.mh", platforms=["cpu", "cuda"])
cleaned: mh.Cleaned = mh.clean(folder="runs", yes=False)
failed: int = checked.exit_code + prepared.exit_code + len(cleaned.removed) + len(reported.failures)
volume: mh.Volume = mh.read_volume("scan.nii.gz", channels=1)
x, y, z = volume.shape
volume = mh.resample(mh.reorient(volume, "LPS"), spacing=(0.8, 0.8, 3.0), order="nearest")
volume = mh.resample_to(mh.Volume(np.zeros((x, y, z)), np.eye(4)), volume.affine, volume.shape)
model = mh.load_model("runs/MambaHoME", precision="bf16")
labels: mh.Volume = mh.segment(model, volume, overlap=0.25, labels=["liver"], keep_largest="all", progress=True)
note: str | None = mh.write_volume("out.nii.gz", labels, np.uint8, {1: "liver"})
mh.show(volume, labels, names={1: "liver"}).save("picture.png")
references: np.ndarray = mh.read_labels(Path("reference.nii.gz")).array
scores: np.ndarray = mh.dice(labels.array, references, 1)
scores = mh.hd95(labels.array, references, [1, 2], volume.spacing) + mh.nsd(labels.array, references, 2, (1, 1, 1), 2.0)
scores = mh.assd(labels.array, references, 2, (1.0, 1.0, 1.0))
millilitres: dict[str, float] = mh.volumes_ml(labels, {1: "liver"})
network = mh.MambaHoME.of_size("tiny", in_chans=1, out_chans=3, rngs=rngs, precision="fp32")
published = mh.MambaHoME(mh.ModelConfig(out_chans=3), rngs=rngs, metadata=mh.DataProperties(modality="mr"))
networks = [mh.SegMamba(1, 3, rngs=rngs), mh.PlainUNet(1, 3, rngs=rngs, feat_size=(8, 16), strides=[(2, 2, 2)])]
numerics = mh.Numerics(jnp.float32, "fp32")
layers = [mh.Mamba(32, rngs=rngs, numerics=numerics), mh.BiMamba(32, rngs=rngs, num_slices=4)]
experts = [mh.HoME(32, rngs=rngs, group_size=64), mh.SoftMoE(32, rngs=rngs, num_experts=4)]
tokens: jax.Array = experts[0](layers[0](np.zeros((1, 64, 32), np.float32)))
sizes: list[str] = [*mh.MODEL_SIZES]


class Printed(mh.Callback):
    def validation(self, step: int, validation: mh.Validation) -> None:
        print(step, validation.dice, dict(validation.structures))


mh.train(data_train="prepared", tracker=["wandb"], callbacks=[Printed()])


@nnx.jit
def step(model: mh.MambaHoME, image: jax.Array, target: jax.Array) -> jax.Array:
    return mh.dice_ce(model(image), target)


image = np.zeros((1, 32, 32, 32, 1), np.float32)
loss: float = float(step(network, jnp.asarray(image), jnp.zeros(image.shape[:4], jnp.int32)))
unet = mh.ResEncUNet(1, 3, rngs=rngs, precision="bf16")
logits: jax.Array | np.ndarray = mh.sliding_window(unet, image[0], (16, 16, 16), 0.5, mode="constant")
weights: dict[str, np.ndarray] = mh.export_official(published)
states, last = kernels.selective_scan(tokens, tokens, jnp.ones((32, 4)), tokens[..., :4], tokens[..., :4])
voxels = kernels.norm_act((kernels.conv3d(jnp.asarray(image), jnp.ones((3, 3, 3, 1, 4))),), slope=0.01)
try:
    print(mh.__version__, planned.plan, note, failed, scores, millilitres, sizes, loss, logits, weights, states, last)
except (mh.ConfigError, mh.CheckpointError, mh.DatasetError, mh.OutputError, mh.TrainingError) as error:
    message: str = str(error)
except (mh.MambaHomeError, mh.ScanWarning, kernels.Unsupported) as error:
    print(error, voxels, networks, kernels.choose_backend)
