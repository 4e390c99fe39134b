"""plan.json: preprocess writes it, obeys an edited one, and check comes to the same."""

import json
import re
import shlex
from dataclasses import replace

import pytest

import mambahome_jax as mh
from mambahome_jax.cli import run_command
from mambahome_jax.commands.preprocess import run
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing import plan_folder
from mambahome_jax.preprocessing.plan import PLAN, follow_plan, plan_lines, read_plan
from tests.commands.scans import description, preprocess_config
from tests.commands.test_train import small_networks


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return replace(preprocess_config(tmp_path), spacing=None)


def edit(config, **values):
    file = config.output_path / PLAN
    content = json.loads(file.read_text())
    for name, value in values.items():
        content[name]["value"] = value
    file.write_text(json.dumps(content))
    return file


def test_preprocess_plans_from_the_scans_as_check_does(config, capsys):
    assert run(config) == 0
    out = capsys.readouterr().out
    assert "Spacing: 2 1 3 mm, the median of each axis over 3 cases" in out and "which you may edit" in out
    assert description(config)["spacing"] == [2, 1, 3]
    stored = read_plan(config.output_path / PLAN)
    assert not stored.edited and stored.machine == "a CPU"
    plan = mh.check(folder=config.input_path, num_workers=1).summary.plan
    ours, theirs = ({name: setting.value for name, setting in s.items()} for s in (stored.settings, plan.settings()))
    assert ours == theirs
    measured = json.loads((config.output_path / PLAN).read_text())["fingerprint"]
    assert measured["structures"]["label_1"] == {"cases": 3, "median_ml": 0.432}
    assert measured["resampled"]["shape"] == [12, 16, 8]


def test_the_index_of_a_prepared_folder_is_read_once(config, monkeypatch):
    assert run(config) == 0
    opened = []
    monkeypatch.setattr(plan_folder, "Store", lambda root: opened.append(root) or Store(root))
    assert mh.plan(folder=config.output_path).prepared
    assert len(opened) == 1


def test_an_edited_plan_is_obeyed_and_kept(config, tmp_path, capsys):
    assert run(config) == 0
    file = edit(config, spacing=[2, 2, 3], batch_size=7)
    assert run(config) == 0
    assert "Plan: all of" in capsys.readouterr().out
    assert description(config)["spacing"] == [2, 2, 3]
    # Once more: that it was edited is not forgotten, by preprocess nor by plan.
    assert mh.plan(folder=config.output_path, output=file).plan.batch_size.value == 7
    assert run(config) == 0
    assert read_plan(file).settings["batch_size"].value == 7 and read_plan(file).edited
    other = replace(config, output_path=tmp_path / "other", plan=file)
    assert run(other) == 0
    assert description(other)["spacing"] == [2, 2, 3]
    assert read_plan(other.output_path / PLAN).settings["batch_size"].value == 7
    # A flag wins, and --overwrite plans anew.
    assert run(replace(other, spacing=(3, 3, 3))) == 0 and description(other)["spacing"] == [3, 3, 3]
    assert run(replace(config, overwrite=True)) == 0 and description(config)["spacing"] == [2, 1, 3]
    assert read_plan(file).settings["batch_size"].value != 7


def test_a_plan_that_cannot_be_read_is_refused(config):
    assert run(config) == 0
    edit(config, spacing=[2, 2])
    with pytest.raises(DatasetError, match=r"plan\.json: spacing is \[2, 2\]; expected three numbers in mm"):
        run(config)


def test_the_command_explains_raw_and_preprocessed_folders(config, tmp_path, capsys):
    assert run_command("plan", [str(config.input_path)], "mambahome plan") == 0
    out = capsys.readouterr().out
    assert "3 cases, for a CPU" in out and "MambaHoME_tiny" in out and "mambahome preprocess --input_path" in out
    assert run(config) == 0
    raw, ready = mh.plan(folder=config.input_path), mh.plan(folder=config.output_path)
    assert (raw.prepared, ready.prepared) == (False, True)
    ours, theirs = ({name: s.value for name, s in plan.settings().items()} for plan in (raw.plan, ready.plan))
    assert ours == theirs
    file = tmp_path / "large.json"
    other = mh.plan(folder=config.output_path, memory=80, max_minutes=5, output=file)
    assert (other.before, other.plan.model.value) == (ready.plan, "MambaHoME_small")
    assert other.plan.length.value == {"minutes": 5} and read_plan(file).machine == "a GPU of 80 GiB"
    capsys.readouterr()
    words = [str(config.output_path), "--memory", "16"]
    assert run_command("plan", words, "mambahome plan") == 0
    assert re.search(
        r"a step takes about \d+\.\d of 16 GiB", " ".join(capsys.readouterr().out.replace("│", "").split())
    )
    words = [str(config.output_path), "--model", "MambaHoME"]
    assert run_command("plan", words, "mambahome plan") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "was" in out and "--output" in out and "mambahome train --data_train" in out
    assert run_command("plan", [str(config.output_path), "--max_minutes", "0"], "mambahome plan") == 2
    assert "--max_minutes 0; expected a positive number" in capsys.readouterr().err


def test_train_follows_the_plan_and_refuses_another_spacing(config, tmp_path, capsys, monkeypatch):
    small_networks(monkeypatch)
    assert run(config) == 0
    edit(config, length={"steps": 2}, patch_size=[32, 16, 16], strides=[[2, 2, 2]] * 4, kernel_sizes=[[3, 3, 3]] * 5)
    words = ["--data_train", str(config.output_path), "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    words += ["--deep_supervision", "False"]  # the stand-in for the network has one level
    assert run_command("train", words, "train") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "recipe strong" in out and "A flag wins" in out and "On a CPU" in out
    report = json.loads((tmp_path / "run/run.json").read_text())
    assert (report["step"], report["configuration"]["model"]) == (2, "MambaHoME_tiny")
    assert report["training"]["patch_size"] == [32, 16, 16] and report["model"]["strides"] == [[2, 2, 2]] * 4
    edit(config, spacing=[2, 2, 3])
    assert run_command("train", [*words, "--resume"], "train") == 2
    assert "spacing is 2 2 3, but the cases are resampled to 2 1 3 mm; expected 2 1 3" in capsys.readouterr().err


@pytest.mark.parametrize(("made_for", "here", "model"), [(None, 80.0, "small"), (80.0, None, "tiny")])
def test_the_command_that_train_names_plans_for_this_machine(config, monkeypatch, made_for, here, model):
    monkeypatch.setattr("mambahome_jax.preprocessing.dataset.gpu_memory_gib", lambda: made_for)
    assert run(config) == 0
    stored, flags = read_plan(config.output_path / PLAN), TrainConfig(config.output_path)
    monkeypatch.setattr(plan_folder, "gpu_memory_gib", lambda: here)
    kind = "cpu" if here is None else "gpu"
    note = plan_lines(flags, follow_plan(flags, stored.settings), stored, kind)[1]
    words = shlex.split(note.partition("; mambahome plan ")[2].removesuffix(" plans for it"))
    assert ("--memory" in words) == (kind == "cpu")
    assert run_command("plan", words, "mambahome plan") == 0
    again = read_plan(config.output_path / PLAN)
    assert again.settings["model"].value == f"MambaHoME_{model}" and not again.edited
    assert len(plan_lines(flags, follow_plan(flags, again.settings), again, kind)) == 1 + (kind == "cpu")
    assert (
        "yours to change"
        in plan_lines(flags, flags.__class__(flags.data_train, steps=1), stored._replace(edited=True), kind)[1]
    )
