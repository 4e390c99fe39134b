"""One file for deployment: its programs, its labels, and what it refuses."""

import json
import shutil
import subprocess
import sys
import zipfile

import jax.export
import numpy as np
import pytest
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.cli import main
from mambahome_jax.commands import infer
from mambahome_jax.config import DataProperties, ModelConfig, PlainUNetConfig
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError
from mambahome_jax.flags import ExportConfig, InferConfig
from mambahome_jax.inference.segment import Segmenter, SegmentOptions
from mambahome_jax.model.networks import make_network
from mambahome_jax.weights.export import export_model
from mambahome_jax.weights.model_path import CROSS_VALIDATION
from mambahome_jax.weights.weights import Weights, flat_params, write_weights
from tests.commands.scans import AFFINE, write
from tests.conftest import ROOT
from tests.nnunet_models import miniature, model_folder

SMALL = PlainUNetConfig(
    1, 3, depths=(1, 1), feat_size=(4, 8), strides=((2, 2, 2),), kernel_sizes=((3, 3, 3),) * 2, decoder_depths=(1,)
)
DATA = DataProperties(
    spacing=(2.0, 1.0, 2.0),
    modality="mr",
    labels=((1, "liver"), (2, "spleen")),
    values=((1, 100), (2, 255)),
    mirror=("LR", "AP", "IS"),
    patch_size=(8, 16, 8),
    trained_on=(("someone",),),
)
MAMBA = ModelConfig(1, 2, depths=(1,) * 4, feat_size=(4, 8, 8, 8), hidden_size=8, experts_list=(2,) * 4)
# What an exported model runs without, on the command line and in Python.
NETWORKS = ("flax", "orbax", "optax", "grain", "safetensors", "mambahome_kernels", "mambahome_jax.model")
OTHERS = ("rich", "tyro", "PIL", "filelock", "jinja2", "tensorboardX", "isal", "tensorstore", "SimpleITK", "absl")
ALONE = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
"""
IN_PYTHON = """
import mambahome_jax as mh
model, scan, result = sys.argv[2:]
mh.write_volume(result, mh.segment(mh.load_model(model), mh.read_volume(scan), tta=True))
"""
ON_THE_COMMAND_LINE = """
from mambahome_jax.cli import main
main(["infer", *sys.argv[2:]])
"""


def weights_of(config, data=DATA, seed=0):
    network = make_network(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)  # zeros, as biases begin, would hide that they are swapped
    params = flat_params(network)
    return Weights(
        {name: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for name, a in params.items()}, config, data
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with weights, their exported file, and a scan."""
    folder = tmp_path_factory.mktemp("exported")
    write_weights(folder / "w.safetensors", weights_of(SMALL))
    platforms = ("cpu", "cuda", "tpu")
    result = export_model(ExportConfig(folder / "w.safetensors", folder / "model.mh", platforms=platforms))
    assert result.window == DATA.patch_size
    assert result.scans == {"cpu": "fp32, no scan", "cuda": "bf16, no scan", "tpu": "fp32, no scan"}
    noise = np.random.default_rng(0).normal(size=(12, 20, 10)).astype(np.float32)
    write(folder / "scans" / "a.nii.gz", noise, AFFINE)
    return folder


@pytest.fixture(scope="module")
def labels(home):
    """What the weights themselves make of the scan."""
    model = mh.load_model(home / "w.safetensors")
    result = mh.segment(model, mh.read_volume(home / "scans" / "a.nii.gz"), tta=True).array
    assert set(np.unique(result)) == {0, 100, 255}
    return result


def changed(source, path, **members):
    """A copy of an exported file with other members; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = members.get(name.replace(".", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def alone(blocked, code, *arguments):
    command = [sys.executable, "-c", ALONE + code, " ".join(blocked), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_labels_are_equal_where_jax_numpy_and_nibabel_alone_are_installed(home, labels, tmp_path):
    result = tmp_path / "a.nii.gz"
    alone((*NETWORKS, *OTHERS), IN_PYTHON, home / "model.mh", home / "scans" / "a.nii.gz", result)
    np.testing.assert_array_equal(mh.read_labels(result).array, labels)


def test_infer_takes_it_without_flax(home, labels, tmp_path):
    flags = ("--data_path", home / "scans", "--model_path", home / "model.mh", "--output_dir", tmp_path / "out")
    alone(NETWORKS, ON_THE_COMMAND_LINE, *flags, "--tta", "--previews", "False")
    np.testing.assert_array_equal(mh.read_labels(tmp_path / "out" / "a.nii.gz").array, labels)
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["labels"] == {"100": "liver", "255": "spleen"} and report["settings"]["modality"] == "mr"


def test_results_of_the_weights_stay_where_the_file_would_make_the_same(home, tmp_path, capsys):
    config = InferConfig(home / "scans", home / "w.safetensors", tmp_path / "out", previews=False, skip_existing=True)
    assert infer.run(config) == 0
    capsys.readouterr()
    again = InferConfig(home / "scans", home / "model.mh", tmp_path / "out", previews=False, skip_existing=True)
    assert infer.run(again) == 0
    assert "1 results are there already" in capsys.readouterr().out


def test_networks_that_vote_share_a_program(tmp_path, home, capsys):
    for n in range(2):
        write_weights(tmp_path / "run" / f"fold_{n}" / "checkpoints" / "best", weights_of(SMALL, seed=n))
    (tmp_path / "run" / CROSS_VALIDATION).mkdir()
    learned = {"largest_part": {"liver": {"kept": True}, "spleen": {"kept": False}}}
    (tmp_path / "run" / CROSS_VALIDATION / "summary.json").write_text(json.dumps(learned))
    result = mh.export(model=tmp_path / "run", destination=tmp_path / "m.mh", platforms=["cpu"])
    assert (result.path, result.networks, result.window) == (tmp_path / "m.mh", 2, DATA.patch_size)
    assert capsys.readouterr() == ("", "")
    with zipfile.ZipFile(tmp_path / "m.mh") as archive:
        assert archive.namelist() == ["manifest.json", "program_0.cpu", "weights_0.npz", "weights_1.npz"]
    for name, model in (("run", tmp_path / "run"), ("file", tmp_path / "m.mh")):
        assert infer.run(InferConfig(home / "scans", model, tmp_path / name, previews=False)) == 0
    one, other = (mh.read_labels(tmp_path / name / "a.nii.gz").array for name in ("run", "file"))
    np.testing.assert_array_equal(one, other)
    assert json.loads((tmp_path / "file" / "run.json").read_text())["configuration"]["keep_largest"] == ["liver"]
    model = mh.load_model(tmp_path / "m.mh")
    with pytest.raises(ConfigError, match="2 networks that vote"):
        model(np.zeros((1, 8, 16, 8, 1)))


def test_a_model_folder_of_nnunet_keeps_its_way_of_scans(tmp_path):
    source = model_folder(miniature("aniso"))
    export_model(ExportConfig(source, tmp_path / "m.mh", platforms=("cpu",)))
    settings = [Segmenter.of(mh.load_model(path), SegmentOptions()).settings for path in (source, tmp_path / "m.mh")]
    assert settings[0] == settings[1] and settings[0].nnunet is not None
    with pytest.raises(ConfigError, match="--spacing: nnU-Net's plans say"):
        export_model(ExportConfig(source, tmp_path / "n.mh", spacing=(1, 1, 1)))


@pytest.mark.parametrize("when", ["export", "infer"])
def test_modality_and_spacing_can_be_overridden(when, tmp_path):
    source, path = tmp_path / "w.safetensors", tmp_path / "m.mh"
    write_weights(source, weights_of(SMALL, data=None))
    changes = {"modality": "us", "spacing": (1.0, 1.0, 2.0)}
    at = {"export": {}, "infer": {}} | {when: changes}
    export_model(ExportConfig(source, path, platforms=("cpu",), roi_size=(8, 16, 8), **at["export"]))
    expected = Segmenter.of(mh.load_model(source), SegmentOptions(**changes, roi_size=(8, 16, 8))).settings
    assert Segmenter.of(mh.load_model(path), SegmentOptions(**at["infer"])).settings == expected
    assert expected.chain == "published"


def test_each_platform_gets_a_program_of_its_own(tmp_path):
    write_weights(tmp_path / "w.safetensors", weights_of(MAMBA, data=None))
    scans = export_model(ExportConfig(tmp_path / "w.safetensors", tmp_path / "m.mh", roi_size=(32, 16, 16))).scans
    assert "fp32, the portable scan (not mosaic_gpu: it needs an NVIDIA GPU" in scans["cpu"]
    assert "bf16, the portable scan (not mosaic_gpu: it is made for one batch" in scans["cuda"]
    with zipfile.ZipFile(tmp_path / "m.mh") as archive:
        content = {name: archive.read(f"program_0.{name}") for name in scans}
    assert not any(str(ROOT).encode() in each or b".py" in each for each in content.values())
    programs = {name: jax.export.deserialize(bytearray(each)) for name, each in content.items()}
    assert {name: each.platforms for name, each in programs.items()} == {name: (name,) for name in scans}
    types = {name: {t for t in ("f64", "bf16") if f"x{t}>" in each.mlir_module()} for name, each in programs.items()}
    assert types == {"cpu": {"f64"}, "cuda": {"bf16"}}


def test_what_does_not_fit_the_file_is_refused(home, tmp_path):
    source, path = home / "w.safetensors", home / "model.mh"
    model = mh.load_model(path)
    with pytest.raises(ConfigError, match=r"windows of 8 8 8 voxels; expected 8 16 8, which is fixed"):
        mh.segment(model, mh.Volume(np.zeros((8, 8, 8)), np.eye(4)), roi_size=(8, 8, 8))
    with pytest.raises(ConfigError, match=r"shape \(1, 8, 16, 8, 2\); expected \(batch, 8, 16, 8, 1\)"):
        model(np.zeros((1, 8, 16, 8, 2)))
    assert model(np.zeros((1, 8, 16, 8, 1))).shape == (1, 8, 16, 8, 3)
    with pytest.raises(ConfigError, match=r"computes in fp32\. Leave --precision out"):
        mh.load_model(path, precision="bf16")
    with pytest.raises(ConfigError, match="float32 parameters"):
        mh.load_model(path, np.float64)
    for config, error, text in (
        (ExportConfig(source, path), OutputError, "exists already"),
        (ExportConfig(source, tmp_path / "m.onnx"), ConfigError, "ends in .mh. ONNX is not written"),
        (ExportConfig(source, tmp_path / "m.mh", platforms=()), ConfigError, "--platforms names none"),
        (ExportConfig(path, tmp_path / "m.mh"), ConfigError, "exported already"),
        (ExportConfig(source, tmp_path / "m.mh", roi_size=(7, 8, 8)), ConfigError, "7"),
    ):
        with pytest.raises(error, match=text):
            export_model(config)
    assert not list(tmp_path.iterdir())
    export_model(ExportConfig(source, tmp_path / "m.mh", platforms=("cuda",)))
    with pytest.raises(CheckpointError, match=r"programs for cuda; expected one for cpu\. .* --platforms cpu"):
        mh.load_model(tmp_path / "m.mh")


def test_a_damaged_file_is_named(home, tmp_path):
    path = home / "model.mh"
    manifest = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    other = tmp_path / "other"
    write_weights(other / "w.safetensors", weights_of(PlainUNetConfig(**vars(SMALL) | {"feat_size": (4, 4)})))
    export_model(ExportConfig(other / "w.safetensors", other / "m.mh", platforms=("cpu",)))
    whole = path.read_bytes()
    (tmp_path / "cut.mh").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mh").write_text("no archive")
    shutil.copy(home / "w.safetensors", tmp_path / "weights.mh")
    changed(path, tmp_path / "later.mh", manifest_json=json.dumps(manifest | {"format": 2}))
    changed(path, tmp_path / "entry.mh", manifest_json=json.dumps({**manifest, "window": "8"}))
    changed(path, tmp_path / "none.mh", manifest_json=json.dumps({**manifest, "networks": []}))
    changed(path, tmp_path / "program.mh", program_0_cpu=b"no program")
    changed(path, tmp_path / "missing.mh", weights_0_npz=None)
    changed(path, tmp_path / "swapped.mh", weights_0_npz=zipfile.ZipFile(other / "m.mh").read("weights_0.npz"))
    files = sorted(tmp_path.glob("*.mh"))
    assert len(files) == 9
    for file in (*files, tmp_path / "nowhere.mh"):
        with pytest.raises(CheckpointError, match=file.name):
            mh.load_model(file)


def test_the_command_says_what_it_wrote(home, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["export", str(home / "w.safetensors"), str(tmp_path / "m.mh"), "--platforms", "cpu"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "cpu: fp32, no scan" in out and "windows of 8 16 8 voxels" in out
    assert "mambahome infer --data_path SCANS --model_path" in out.replace("\n", " ")
