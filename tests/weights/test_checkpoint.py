"""Checkpoint folders of parameters alone: what is written comes back, and damage has a message."""

import logging
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.errors import CheckpointError, OutputError
from mambahome_jax.weights import checkpoint

CONFIG = {"model": {"in_chans": 1, "depths": [1, 1, 2, 1]}, "step": 3}


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])


def test_round_trip_is_exact_and_keeps_indices(tmp_path):
    params = nnx.to_pure_dict(nnx.state(_Net(nnx.Rngs(0))))
    params["double"] = np.array([1 / 3], np.float64)
    checkpoint.write_checkpoint(tmp_path / "best", params, CONFIG)
    read = checkpoint.read_checkpoint_params(tmp_path / "best")
    assert set(read["layers"]) == {0, 1}
    for layer in (0, 1):
        for name in ("kernel", "bias"):
            assert isinstance(read["layers"][layer][name], np.ndarray)
            np.testing.assert_array_equal(read["layers"][layer][name], params["layers"][layer][name])
    assert read["double"].dtype == np.float64 and read["double"] == params["double"]
    assert checkpoint.read_checkpoint_config(tmp_path / "best") == CONFIG
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_existing_folder_is_replaced_only_on_request(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", {"w": jnp.ones(2)}, CONFIG)
    with pytest.raises(OutputError, match="exists already"):
        checkpoint.write_checkpoint(tmp_path / "best", {"w": jnp.zeros(2)}, CONFIG)
    checkpoint.write_checkpoint(tmp_path / "best", {"w": jnp.zeros(2)}, CONFIG, overwrite=True)
    np.testing.assert_array_equal(checkpoint.read_checkpoint_params(tmp_path / "best")["w"], [0, 0])


def test_crash_between_the_renames_leaves_the_earlier_checkpoint_readable(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "best", {"w": np.ones(2)}, CONFIG)
    # The state after a kill between the two renames of the swap.
    shutil.copytree(tmp_path / "best", tmp_path / "best.partial")
    (tmp_path / "best").replace(tmp_path / "best.previous")
    np.testing.assert_array_equal(checkpoint.read_checkpoint_params(tmp_path / "best")["w"], [1, 1])
    checkpoint.write_checkpoint(tmp_path / "best", {"w": np.zeros(2)}, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    np.testing.assert_array_equal(checkpoint.read_checkpoint_params(tmp_path / "best")["w"], [0, 0])


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run, or a checkpoint"):
        checkpoint.read_checkpoint_params(tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best"
    checkpoint.write_checkpoint(best, {"w": np.ones(2)}, CONFIG)
    np.testing.assert_array_equal(checkpoint.read_checkpoint_params(tmp_path / "run")["w"], [1, 1])
    best.replace(best.with_name("best.previous"))
    assert checkpoint.read_checkpoint_config(tmp_path / "run") == CONFIG


@pytest.mark.parametrize(
    ("given", "named"), [("run/checkpoints", "best"), ("", "run/checkpoints/best"), ("new", "RUN")]
)
def test_a_folder_above_a_checkpoint_names_it(tmp_path, given, named):
    for name in ("run/checkpoints/best/config.json", "new/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    example = tmp_path / given / named if named != "RUN" else "RUN/checkpoints/best"
    with pytest.raises(CheckpointError, match=f"expected a run, or a checkpoint such as {example}. Check"):
        checkpoint.find_checkpoint(tmp_path / given)


def test_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoint.write_checkpoint(tmp_path / "best", {"w": np.ones(2)}, CONFIG)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "finish_checkpoint", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path / "best", {"w": np.zeros(2)}, CONFIG, overwrite=True)
    np.testing.assert_array_equal(checkpoint.read_checkpoint_params(tmp_path / "best")["w"], [1, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_too_little_space_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(total=10_000, free=1_000))
    with pytest.raises(OutputError, match=r"best: cannot be written \(1.06 MB needed, 0.001 MB free\). Is the disk"):
        checkpoint.write_checkpoint(tmp_path / "best", {"w": np.ones(1_000)}, CONFIG)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_a_write_that_fails_halfway_leaves_nothing_and_no_page_of_text(tmp_path, monkeypatch, caplog):
    def fail(self, folder, **_):
        folder.with_name(folder.name + ".orbax-checkpoint-tmp").mkdir()
        logging.getLogger("absl").error("a page of text")
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "w": No space left on device [source locations=...]\nmore')

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", fail)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\). Is the disk full"):
        checkpoint.write_checkpoint(tmp_path / "best", {"w": np.ones(2)}, CONFIG)
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        checkpoint.read_checkpoint_config(tmp_path / "nowhere")
    checkpoint.write_checkpoint(tmp_path / "best", {"w": np.ones(1000)}, CONFIG)
    for file in (tmp_path / "best" / "model").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_checkpoint_params(tmp_path / "best")
    (tmp_path / "best" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        checkpoint.read_checkpoint_config(tmp_path / "best")
