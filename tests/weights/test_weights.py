"""Exchange of weights: bit-equal round trips, every fault named, nothing run from a .pth."""

import json
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import mambahome_jax as mh
from mambahome_jax.ranges import ScanRanges
from mambahome_jax.weights.pth import read_pth, write_pth
from mambahome_jax.weights.weights import read_weights, write_weights
from tests.conftest import golden_path

PATH = "mambahome_tiny.pth"


@pytest.fixture(scope="module")
def official():
    """Published tensors, read from the file."""
    return {name: np.array(array) for name, array in read_pth(golden_path(PATH))["model"].items()}


def test_load_and_export_are_bit_equal(official):
    model = mh.load_model(golden_path(PATH))
    exported = mh.export_official(model)
    assert exported.keys() == official.keys()
    for name, array in official.items():
        assert exported[name].dtype == array.dtype
        np.testing.assert_array_equal(exported[name], array)
    assert model.config.group_list == (64, 32, 16, 8)
    assert model.config.depths == (1, 1, 2, 1)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ""])
def test_round_trip(suffix, tmp_path, official):
    """Published -> ours -> any form -> ours, bit for bit, with the configuration."""
    weights = read_weights(golden_path(PATH))
    weights = weights._replace(data=mh.DataProperties(labels=((1, "liver"),), modality="mr", patch_size=(32, 32, 32)))
    write_weights(tmp_path / f"w{suffix}", weights)
    again = read_weights(tmp_path / f"w{suffix}")
    assert again.config == weights.config
    assert again.data == weights.data
    exported = mh.export_official(mh.load_model(tmp_path / f"w{suffix}"))
    assert all((exported[name] == official[name]).all() for name in official)
    with pytest.raises(mh.OutputError, match="exists already"):
        write_weights(tmp_path / f"w{suffix}", weights)
    write_weights(tmp_path / f"w{suffix}", weights, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [f"w{suffix}"]


def test_torch_reads_what_we_write(tmp_path, official):
    torch = pytest.importorskip("torch")
    write_weights(tmp_path / "w.pth", read_weights(golden_path(PATH)))
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert all((content["model"][name].numpy() == array).all() for name, array in official.items())


def test_export_takes_any_tree_of_the_parameters():
    model = mh.load_model(golden_path(PATH))
    _, state = nnx.split(model)
    doubled = jax.tree.map(lambda a: 2 * a, state)
    for tree in (doubled, nnx.to_pure_dict(doubled), jax.tree.map(np.asarray, doubled)):
        exported = mh.export_official(tree)
        np.testing.assert_array_equal(exported["out.conv.conv.bias"], 2 * np.asarray(model.decoder.out.bias[...]))


def test_faults_are_listed_by_name(tmp_path, official):
    bad = dict(official)
    del bad["mamba_encoder.gscs.1.proj2.bias"]
    bad["head.weight"] = np.zeros(3, np.float32)
    bad["decoder3.conv_block.conv2.conv.weight"] = np.zeros((1, 2, 3, 3, 3), np.float32)
    np.savez(tmp_path / "bad.npz", **bad)
    with pytest.raises(mh.CheckpointError) as caught:
        mh.load_model(tmp_path / "bad.npz")
    message = str(caught.value)
    assert "missing (1): mamba_encoder.gscs.1.proj2.bias" in message
    assert "unknown (1): head.weight" in message
    assert "decoder3.conv_block.conv2.conv.weight is (1, 2, 3, 3, 3), expected (16, 16, 3, 3, 3)" in message
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(mh.CheckpointError, match="no tensor named mamba_encoder"):
        mh.load_model(tmp_path / "other.npz")


def test_configuration_beside_the_weights(tmp_path, official):
    """Without it the groups are the published ones; with a .json beside, its own. Wrapper names are taken off."""
    np.savez(tmp_path / "w.npz", **{f"module.{name}": array for name, array in official.items()})
    assert mh.load_model(tmp_path / "w.npz").config.group_list == (2048, 1024, 512, 256)
    (tmp_path / "w.json").write_text(json.dumps({"group_list": [64, 32, 16, 8]}))
    assert mh.load_model(tmp_path / "w.npz").config.group_list == (64, 32, 16, 8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{not json", "cannot be read .*expected JSON"),
        ("[1, 2]", "is a list; expected a JSON object"),
        ('{"group_list": "abcd"}', "group_list is 'abcd'; expected four positive integers"),
        ('{"group_list": [1, 2]}', r"group_list is \(1, 2\); expected four positive integers"),
        ('{"model": {"use_checkpoint": "no"}}', "use_checkpoint is 'no'; expected true or false"),
        ('{"data": {"labels": ["a"]}}', r"labels is \['a'\]; expected"),
        ('{"data": {"spacing": "abc"}}', "spacing is 'abc'; expected three numbers"),
        ('{"data": {"modality": "xray"}}', "modality is 'xray'; expected one of ct, mr, us"),
    ],
)
def test_a_damaged_configuration_names_the_file_and_the_value(config, words, tmp_path, official):
    np.savez(tmp_path / "w.npz", config_json=np.asarray(config), **official)
    with pytest.raises(mh.CheckpointError, match=f"w.npz: .*{words}"):
        read_weights(tmp_path / "w.npz")


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


def test_a_pth_runs_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {}, "bomb": _Bomb()}, protocol=2))
    content = read_pth(tmp_path / "bomb.pth")
    assert type(content["bomb"]).__name__ == "Unknown"


def test_pth_beyond_its_storage_is_refused(tmp_path):
    write_pth(tmp_path / "w.pth", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, {})
    np.testing.assert_array_equal(read_pth(tmp_path / "w.pth")["model"]["a"], [[0, 1, 2], [3, 4, 5]])
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["archive/data/0"] = parts["archive/data/0"][:8]
    with zipfile.ZipFile(tmp_path / "short.pth", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(mh.CheckpointError, match="beyond the end of its storage"):
        read_pth(tmp_path / "short.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors", "w.txt"])
def test_files_that_are_no_weights(name, tmp_path):
    with pytest.raises(mh.CheckpointError, match="no such"):
        mh.load_model(tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(mh.CheckpointError, match=name):
        mh.load_model(tmp_path / name)


def test_float64_needs_x64():
    with pytest.raises(mh.ConfigError, match="JAX_ENABLE_X64"):
        mh.load_model(golden_path(PATH), param_dtype=jnp.float64)


def test_the_score_of_a_training_and_the_ranges_of_its_scans_are_read_and_converted(tmp_path):
    ranges = (ScanRanges("ct", 4, ((1, 2), (3, 4), (5, 6))),)
    weights = read_weights(golden_path(PATH))._replace(data=mh.DataProperties(ranges=ranges))
    write_weights(tmp_path / "run", weights)
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best": {"step": 3, "val_dice": 0.25}}))
    write_weights(tmp_path / "w.npz", read_weights(tmp_path / "run"))
    for path in (tmp_path / "run", tmp_path / "w.npz"):
        data = mh.load_model(path).metadata
        assert (data.ranges, data.val_dice) == (ranges, 0.25)


def test_a_folder_has_the_layout_of_a_model_hub(tmp_path, official):
    data = mh.DataProperties(labels=((1, "liver | spleen"), (2, "<b>")), modality="mr", val_dice=0.5)
    folder = tmp_path / "hub"
    write_weights(folder, read_weights(golden_path(PATH))._replace(data=data))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # others may read the weights as the rest
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert tensors.keys() == official.keys() and all((tensors[name] == official[name]).all() for name in official)
    card = (folder / "README.md").read_text()
    assert "tags: [medical, segmentation, mr, jax]" in card and "0.5000" in card
    assert r"3 classes with the background: 1 liver \| spleen, 2 \<b\>" in card
    for path in (folder, shutil.copytree(folder, tmp_path / "run" / "checkpoints" / "best").parents[1]):
        assert mh.load_model(path).metadata == data
    (folder / "config.json").unlink()
    assert mh.load_model(folder).metadata is None
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(mh.CheckpointError, match=r"model\.safetensors: cannot be read"):
        mh.load_model(folder)


def test_a_folder_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    weights = read_weights(golden_path(PATH))
    write_weights(tmp_path / "hub", weights)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(mh.OutputError, match=r"hub: cannot be written \(No space left on device\)"):
        write_weights(tmp_path / "hub", weights, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"] and read_weights(tmp_path / "hub").config
