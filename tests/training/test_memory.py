"""Steps that do not fit: fewer and smaller patches in their place, one line for flags that were given, what is kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mambahome_jax.cli import run_command
from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.errors import ConfigError
from mambahome_jax.preprocessing.plan import VERSION
from mambahome_jax.support import devices
from mambahome_jax.training import memory as memory_module
from mambahome_jax.training import train as training
from mambahome_jax.training.memory import DeviceMemoryError, StepMemory, smaller_sizes
from tests.commands.test_train import _dataset, small_networks


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_networks(monkeypatch)
    size = MODEL_SIZES["MambaHoME_tiny"]
    monkeypatch.setitem(MODEL_SIZES, "MambaHoME_tiny", replace(size, patch_size=(32, 32, 16)))


def _words(data, out, *more):
    words = ["--data_train", str(data), "--output_dir", str(out), "--model", "MambaHoME_tiny", "--num_workers", "0"]
    return [*words, "--steps", "2", "--hold_out", "0", *more]


def _report(run):
    return json.loads((run / "run.json").read_text())


def _offer(monkeypatch, gib):
    monkeypatch.setattr(memory_module, "free_device_bytes", lambda device: int(gib * 2**30))


def test_a_step_that_does_not_fit_is_made_smaller_and_a_resumed_run_keeps_it(tmp_path, monkeypatch, capsys):
    data = _dataset(tmp_path / "data")
    assert run_command("train", _words(data, tmp_path / "free"), "train") == 0
    free = _report(tmp_path / "free")
    needed = free["memory"]["xla_gib"]
    assert free["configuration"]["batch_size"] == 2 and needed > 0 and free["memory"]["offered_gib"] is None
    _offer(monkeypatch, 0.8 * needed)
    capsys.readouterr()
    assert run_command("train", _words(data, tmp_path / "run"), "train") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a step of 2 patches of 32 x 32 x 16 takes" in out and "Trying a step of 1 patch of 32 x 32 x 16" in out
    report = _report(tmp_path / "run")
    assert (report["configuration"]["batch_size"], report["training"]["global_batch"]) == (1, 1)
    assert report["memory"]["xla_gib"] < report["memory"]["offered_gib"] < needed and report["step"] == 2
    monkeypatch.undo()
    small_networks(monkeypatch)
    assert run_command("train", [*_words(data, tmp_path / "run", "--resume"), "--steps", "4"], "train") == 2
    assert "total_steps was 2, now 4" in capsys.readouterr().err  # and nothing else differs
    _offer(monkeypatch, 0.3 * needed)
    assert run_command("train", _words(data, tmp_path / "tiny"), "train") == 0
    assert _report(tmp_path / "tiny")["training"]["patch_size"] == [32, 16, 16]


def test_a_run_goes_on_with_the_mixer_that_it_began_with(tmp_path, capsys):
    """That of a version whose plans had none, though the folder is planned anew."""
    data, run = _dataset(tmp_path / "data"), tmp_path / "run"
    assert run_command("train", _words(data, run), "train") == 0
    (data / "plan.json").write_text(json.dumps({"version": VERSION, "mixer": {"value": "none"}}))
    assert run_command("train", _words(data, run, "--resume"), "train") == 0
    assert _report(run)["configuration"]["mixer"] == "scan"
    assert run_command("train", _words(data, run, "--resume", "--mixer", "none"), "train") == 2
    assert "mixer was scan, now none" in capsys.readouterr().err


def test_flags_that_were_given_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    data = _dataset(tmp_path / "data")
    _offer(monkeypatch, 0.03)
    words = _words(data, tmp_path / "run", "--batch_size", "3", "--mixer", "scan")
    assert run_command("train", words, "train") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batch_size 3: a step of 3 patches of 32 x 32 x 16 takes" in error
    assert "; expected --batch_size" in error and _report(tmp_path / "run")["exit_code"] == 2
    _offer(monkeypatch, 0)
    assert run_command("train", _words(data, tmp_path / "run"), "train") == 2
    assert "Use a smaller --model" in capsys.readouterr().err


def no_account():
    raise jax.errors.JaxRuntimeError("INTERNAL: no buffer assignment")


def _exhausted(monkeypatch, fails):
    """Steps that raise as XLA does where `fails` (calls so far, patches) says."""
    compile_step, calls = training.compile_step, []

    def compiled(train_step, state, batch, mesh, meanwhile):
        program, result = compile_step(train_step, state, batch, mesh, meanwhile)

        def step(*arguments, **named):
            calls.append(batch["image"].shape[0])
            if fails(len(calls), calls[-1]):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
            return program.func(*arguments, **named)

        step.memory_analysis = no_account
        return type(program)(step, **program.keywords), result

    monkeypatch.setattr(training, "compile_step", compiled)


def test_a_running_step_without_memory_starts_anew_with_fewer_patches(tmp_path, monkeypatch, capsys):
    data = _dataset(tmp_path / "data")
    _exhausted(monkeypatch, lambda call, patches: patches == 2 and call == 2)
    assert run_command("train", _words(data, tmp_path / "run"), "train") == 0
    assert "ran out of memory in training. Trying a step of 1 patch" in " ".join(capsys.readouterr().out.split())
    report = _report(tmp_path / "run")
    assert report["step"] == 2 and report["training"]["global_batch"] == 1 and report["memory"] is None
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_after_a_checkpoint_nothing_starts_anew(tmp_path, monkeypatch, capsys):
    data = _dataset(tmp_path / "data")
    _exhausted(monkeypatch, lambda call, patches: call == 2)
    words = _words(data, tmp_path / "run", "--checkpoint_every", "1")
    assert run_command("train", words, "train") == 1
    assert "Error: a device ran out of memory" in capsys.readouterr().out
    monkeypatch.undo()
    small_networks(monkeypatch)
    assert _report(tmp_path / "run")["step"] == 1
    assert run_command("train", [*words, "--resume"], "train") == 0


def _setup(batch=8, patch=(96, 96, 96), strides="published"):
    flags = SimpleNamespace(batch_size=batch, patch_size=patch, strides=strides)
    prepared = SimpleNamespace(spacing=(1.0, 1.0, 5.0), cases=[SimpleNamespace(spacing=(1.0, 1.0, 5.0))])
    multiples = (16, 16, 16) if strides == "published" else (16, 16, 4)
    return SimpleNamespace(
        flags=flags, patch_size=patch, prepared=prepared, model=SimpleNamespace(multiples=multiples), global_batch=batch
    )


@pytest.mark.parametrize(
    ("needed", "offered", "expected"),
    [
        (21, 12, {"batch_size": 4}),
        (21, 20.9, {"batch_size": 7}),
        (21, 3.0, {"batch_size": 1, "patch_size": (80, 80, 96)}),
        (None, None, {"batch_size": 4}),
    ],
)
def test_the_next_smaller_step_by_what_is_offered(needed, offered, expected):
    error = DeviceMemoryError("", None if needed is None else StepMemory(needed << 30, 1 << 30, int(offered * 2**30)))
    assert smaller_sizes(_setup(), error, ()) == expected
    with pytest.raises(ConfigError, match=f"--batch_size 8: .*expected .*--batch_size {expected['batch_size']}"):
        smaller_sizes(_setup(), error, ("batch_size",))


def test_a_smaller_patch_is_whole_for_its_own_strides():
    setup = _setup(1, (192, 192, 24), "auto")
    sizes = smaller_sizes(setup, DeviceMemoryError("", None), ())
    assert np.prod(sizes["patch_size"]) <= 192 * 192 * 24 / 2
    with pytest.raises(ConfigError, match="a smaller --model"):
        smaller_sizes(_setup(1, (32, 16, 16)), DeviceMemoryError("", None), ())


@pytest.mark.parametrize(
    ("stats", "card", "free"),
    [
        (None, [], None),
        ({"bytes_limit": 16 << 30, "bytes_in_use": 1 << 30}, [], 15 << 30),
        ({"bytes_limit": 16 << 30, "bytes_in_use": 1 << 30, "pool_bytes": 16 << 30}, [0.5], 15 << 30),
        # Another program has all but 3 GiB of the card.
        ({"bytes_limit": 16 << 30, "bytes_in_use": 1 << 30, "pool_bytes": 2 << 30}, [3.0], 4 << 30),
        ({"bytes_limit": 16 << 30, "bytes_in_use": 1 << 30, "pool_bytes": 2 << 30}, [60.0], 15 << 30),
    ],
)
def test_what_is_free_of_a_device(monkeypatch, stats, card, free):
    monkeypatch.setattr(devices, "_nvidia_smi", lambda *_: card)
    device = SimpleNamespace(memory_stats=lambda: stats, local_hardware_id=0)
    assert devices.free_device_bytes(device) == free
