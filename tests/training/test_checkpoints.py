"""Checkpoints of a training: bit-exact, whole or not at all, on any number of devices."""

import contextlib
import gc
import os
import shutil
import subprocess
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambahome_jax.errors import CheckpointError, ConfigError, OutputError
from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training import checkpoints
from mambahome_jax.training.checkpoints import CheckpointWriter, check_settings, restore_state
from mambahome_jax.training.distributed import make_mesh
from mambahome_jax.training.optimizer import make_optimizer
from mambahome_jax.training.step import TrainState, init_state
from mambahome_jax.weights.checkpoint import read_checkpoint_config, read_checkpoint_params, remove_partial

CONFIG = {"model": {"width": 8, "classes": 2}, "training": {"lr": 1e-3, "seed": 0}, "step": 1}
OPTIMIZER = make_optimizer(OptimizerConfig())


def _params(width=64):
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(width, 32)).astype(np.float32) for _ in range(2)]
    return {"layers": dict(enumerate(kernels)), "bias": np.arange(width, dtype=np.float32)}


def _state(devices=1, strategy="ddp", width=64):
    return init_state(_params(width), OPTIMIZER, make_mesh(jax.devices()[:devices]), strategy)


@jax.jit
def _changed(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x + 1, state)


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(
    ("written", "read", "strategy"), [(1, 1, "ddp"), (8, 1, "fsdp"), (1, 8, "fsdp"), (4, 8, "ddp")]
)
def test_restores_bit_exactly_on_any_number_of_devices(tmp_path, written, read, strategy):
    state = _changed(_state(written, strategy, width=4096))
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", state, CONFIG, data={"next_index": 7})
    found, data = restore_state(
        tmp_path / "last", jax.eval_shape(lambda: state), make_mesh(jax.devices()[:read]), strategy
    )
    _assert_equal(found, state)
    assert data == {"next_index": 7}
    assert len(found.params["bias"].devices()) == read
    assert found.params["layers"][0].sharding.is_fully_replicated == (strategy == "ddp" or read == 1)
    assert read_checkpoint_config(tmp_path / "last") == CONFIG


def test_donating_the_state_while_it_is_written_changes_nothing(tmp_path):
    state = _state(width=4096)
    expected = jax.tree.map(np.array, state.params)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", state, CONFIG, data={})
        for _ in range(3):
            state = overwrite(state)
    _assert_equal(read_checkpoint_params(tmp_path / "last"), expected)


def test_parameters_alone_cannot_be_resumed(tmp_path):
    # Left by a process that was killed while it wrote.
    (tmp_path / "best.partial.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "best", _state(), CONFIG)
        writer.save(tmp_path / "best", _changed(_state()), CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    _assert_equal(read_checkpoint_params(tmp_path / "best")["bias"], _params()["bias"] + 1)
    with pytest.raises(CheckpointError, match="parameters alone"):
        restore_state(tmp_path / "best", _state(), make_mesh(jax.devices()[:1]))


def test_failure_while_writing_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    state = _state()
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", state, CONFIG, data={})
        writer.wait()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "finish_checkpoint", full)
        writer.save(tmp_path / "last", _changed(state), CONFIG, data={})
        with pytest.raises(OutputError, match=r"No space left on device.*is kept"):
            writer.wait()
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["last"]
        _assert_equal(restore_state(tmp_path / "last", state, make_mesh(jax.devices()[:1]))[0], state)
        writer.save(tmp_path / "last", _changed(state), CONFIG, data={})
    assert int(restore_state(tmp_path / "last", state, make_mesh(jax.devices()[:1]))[0].step) == 1


def test_other_shapes_are_all_listed(tmp_path):
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", _state(), CONFIG, data={})
    other = _state(width=16)
    other.params["extra"] = jnp.zeros(3)
    with pytest.raises(CheckpointError, match=r"extra is missing.*bias is \(64,\), expected \(16,\).*layers/0"):
        restore_state(tmp_path / "last", other, make_mesh(jax.devices()[:1]))


def test_settings_that_differ_are_all_named(tmp_path):
    with CheckpointWriter() as writer:
        writer.save(tmp_path / "last", _state(), CONFIG)
    assert check_settings(tmp_path / "last", {**CONFIG, "step": 5})["step"] == 1
    with pytest.raises(ConfigError, match=r"lr was 0.001, now 0.01; seed was 0, now 2"):
        check_settings(tmp_path / "last", {**CONFIG, "training": {"lr": 1e-2, "seed": 2}})
    with pytest.raises(CheckpointError, match="classes was 2, now 3"):
        check_settings(tmp_path / "last", {**CONFIG, "model": {"width": 8, "classes": 3}})
    # Written before there was dropout: without.
    training = CONFIG["training"] | {"dropout": 0.0}
    check_settings(tmp_path / "last", {**CONFIG, "training": training})
    with pytest.raises(ConfigError, match=r"dropout was 0.0, now 0.1"):
        check_settings(tmp_path / "last", {**CONFIG, "training": training | {"dropout": 0.1}})


def test_a_run_with_a_flag_that_is_gone_goes_on_where_it_did_nothing(tmp_path):
    for name, value in (("neutral", 0.0), ("used", 0.1)):
        with CheckpointWriter() as writer:
            earlier = CONFIG["training"] | {"label_smoothing": value}
            writer.save(tmp_path / name, _state(), {**CONFIG, "training": earlier})
    assert check_settings(tmp_path / "neutral", CONFIG)["step"] == 1
    with pytest.raises(ConfigError, match=r"label_smoothing was 0.1, now None"):
        check_settings(tmp_path / "used", CONFIG)


@pytest.mark.parametrize(("keep", "kept"), [(1, []), (3, ["step_00000002", "step_00000003"])])
def test_the_last_checkpoints_are_kept_and_each_can_be_resumed(tmp_path, keep, kept):
    state = _state()
    with CheckpointWriter() as writer:
        for step in range(1, 5):
            state = _changed(state)
            writer.save(tmp_path / "last", state, {**CONFIG, "step": step}, data={"at": step}, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", *kept]
    for name, step in zip(["last", *kept], [4, 2, 3], strict=False):
        found, data = restore_state(tmp_path / name, jax.eval_shape(lambda: state), make_mesh(jax.devices()[:1]))
        assert int(found.step) == data["at"] == step


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not allow to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_read_only_says_so_and_leaves_no_thread_that_waits(small_disk):
    state, before = _state(), {thread.name for thread in threading.enumerate()}
    with CheckpointWriter() as writer:
        writer.save(small_disk / "last", state, CONFIG, data={"at": 1})
        writer.wait()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(OutputError, match=r"Read-only file system.*is kept"):
            writer.save(small_disk / "last", _changed(state), CONFIG, data={"at": 2})
            writer.wait()
    # They kept the process from its end for ten minutes.
    left = [thread for thread in threading.enumerate() if thread.name not in before and not thread.daemon]
    for thread in left:
        thread.join(60)
    assert not [thread for thread in left if thread.is_alive()]
    assert restore_state(small_disk / "last", state, make_mesh(jax.devices()[:1]))[1] == {"at": 1}


def test_a_disk_without_room_for_files_is_told_before_anything_is_written(tmp_path, monkeypatch):
    found = os.statvfs(tmp_path)
    names = [name for name in dir(found) if name.startswith("f_")]
    full = SimpleNamespace(**{name: getattr(found, name) for name in names} | {"f_files": 1000, "f_favail": 3})
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    needed = pytest.raises(OutputError, match=r"100 files needed, the file system has room for 3")
    with CheckpointWriter() as writer, needed:
        writer.save(tmp_path / "last", _state(), CONFIG, data={})
    assert not list(tmp_path.iterdir())


# Orbax' threads fail one by one, and some after their event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(small_disk, monkeypatch, caplog, foreseen):
    state = _changed(_state(width=1024))
    with CheckpointWriter() as writer:
        writer.save(small_disk / "last", state, CONFIG, data={"at": 1})
        writer.wait()
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        if not foreseen:
            monkeypatch.setattr(checkpoints, "require_space", lambda *_: None)
        reason = r"MB needed, 0 MB free" if foreseen else "No space left on device"
        with pytest.raises(OutputError, match=rf"(?s)last: cannot be written.*{reason}.*disk full.*is kept"):
            writer.save(small_disk / "last", _changed(state), CONFIG, data={"at": 2})
            writer.wait()
        assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "last"]
        found, data = restore_state(small_disk / "last", jax.eval_shape(lambda: state), make_mesh(jax.devices()[:1]))
        _assert_equal(found, state)
        assert data == {"at": 1}
    # The message is ours to give: no page of a traceback for each of those threads.
    assert not [record for record in caplog.records if record.name == "absl"]
    # Here, where it is expected, and not in whatever test comes next: what Orbax' futures failed with.
    with contextlib.suppress(SystemError):
        gc.collect()
    filler.unlink()
    with CheckpointWriter() as writer:
        writer.save(small_disk / "last", _changed(state), CONFIG, data={"at": 2})
    assert read_checkpoint_config(small_disk / "last") == CONFIG


def test_what_a_failed_write_left_goes_though_others_still_write_into_it(tmp_path, monkeypatch):
    """Seen once: Orbax' folder stayed beside the checkpoint."""
    leftover, remove, writes = tmp_path / "last.partial.orbax-checkpoint-tmp", shutil.rmtree, iter((True, True, False))

    def removed_in_vain(path, **options):
        remove(path, **options)
        if next(writes):
            (path / "model").mkdir(parents=True)

    leftover.mkdir()
    (tmp_path / "last").mkdir()
    monkeypatch.setattr(shutil, "rmtree", removed_in_vain)
    remove_partial(tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
