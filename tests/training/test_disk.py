"""What runs take on the disk is said before they begin, and what can go of them goes: listed first, and no more."""

import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

import mambahome_jax as mh
from mambahome_jax.commands import clean as command
from mambahome_jax.commands import train
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError
from mambahome_jax.flags import CleanConfig
from mambahome_jax.support import devices
from mambahome_jax.support.output_folder import LOCK, locked
from mambahome_jax.training import disk
from mambahome_jax.training import train as story
from mambahome_jax.weights.checkpoint import read_checkpoint_params
from tests.commands.test_train import _config, _dataset, small_networks


def write(path: Path, size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def make_run(run: Path, status: str = "finished", stored: bool = False) -> Path:
    """A run's folder, of files without content."""
    write(run / "metrics.csv")
    (run / "run.json").write_text(json.dumps({"command": "train", "status": status}))
    for name in ("best", "last", "step_00000004"):
        for item in ("config.json", "model/a", *(["optimizer/a", "data/a"] if name != "best" else [])):
            write(run / "checkpoints" / name / item)
    if stored:
        for name in ("dataset.json", "store/index.json", "store/a/image/c"):
            write(run / "data" / name)
    return run


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored_bytes(checkpoint: Path) -> int:
    """Bytes of the arrays in a checkpoint."""
    items = [checkpoint / name for name in ("model", "optimizer") if (checkpoint / name).is_dir()]
    leaves = [leaf for item in items for leaf in jax.tree.leaves(ocp.PyTreeCheckpointHandler().metadata(item).tree)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


# --- What a training will take -----------------------------------------------------------------------------------


def test_a_training_says_what_its_checkpoints_take(tmp_path, monkeypatch, capsys):
    small_networks(monkeypatch)
    keep = 2
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", recipe="strong", keep_last=keep, num_workers=0)
    config = replace(config, deep_supervision=False)
    calls = []
    monkeypatch.setattr(
        story, "require_disk", lambda *args, **ended: calls.append(args) or disk.require_disk(*args, **ended)
    )
    assert train.run(config) == 0
    text = capsys.readouterr().out
    said = re.search(r"Disk: checkpoints take (\S+) MB .* MB while one is written; \S+ GB are free in ([^\s;]+)", text)
    assert said is not None and said[2] == str(tmp_path / "run")
    best, last = (stored_bytes(tmp_path / "run/checkpoints" / name) for name in ("best", "last"))
    assert last > 3 * best > 0  # the moving average, the parameters that are trained, and two moments of each
    assert float(said[1]) == pytest.approx((best + keep * last) / 1e6, abs=0.06)

    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    with pytest.raises(OutputError, match=r"other/checkpoints: checkpoints take .*, but 0\.0 MB are free in .*other\."):
        train.run(replace(config, output_dir=tmp_path / "other"))
    assert not list((tmp_path / "other/checkpoints").iterdir())
    # A finished run writes no checkpoint.
    assert train.run(replace(config, resume=True)) == 0
    # A run that goes on replaces its checkpoints, the last of which stays until the next is whole.
    with pytest.raises(
        OutputError, match=r"the next checkpoint takes \S+ MB, but 0\.0 MB are free beside the one that"
    ):
        disk.require_disk(*calls[0])
    monkeypatch.setattr(disk, "free_bytes", lambda folder: last)
    monkeypatch.setattr(disk, "bytes_of", lambda path: best)
    assert "Note: the disk may get full" in disk.require_disk(*calls[0])


# --- What can go -------------------------------------------------------------------------------------------------


def test_a_finished_run_keeps_its_networks_and_nothing_goes_unasked(tmp_path, capsys):
    run = make_run(tmp_path / "run", stored=True)
    before = tree(run)
    assert command.run(CleanConfig(run)) == 0
    text = capsys.readouterr().out
    assert tree(run) == before
    assert "states of the optimizer of a finished run; without: it cannot be resumed" in text
    assert f"0.0 MB  {run}: stores of scans that were trained on as they are" in text
    assert f"Nothing was removed. To remove 0.0 MB: mambahome clean {run} --yes" in text

    result = mh.clean(folder=run)
    assert [item.size for item in result.found] == [3000, 4000] and result.removed == ()
    assert tree(run) == before
    result = mh.clean(folder=run, yes=True)
    assert [size for _, size in result.removed] == [3000, 4000] and result.exit_code == 0
    assert before - tree(run) == {path for path in before if re.search("^data/|/optimizer/|/data/", path)}
    assert tree(run) < before
    assert command.run(CleanConfig(run, yes=True)) == 0
    assert f"Nothing to remove in {run}" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["planned", "given"])
def test_data_that_preprocess_wrote_into_the_folder_of_a_run_stays(tmp_path, how):
    """As with `preprocess --output_path RUN/data` and `train --data_train RUN/data --output_dir RUN`."""
    run = make_run(tmp_path / "run", stored=True)
    if how == "planned":
        write(run / "data/plan.json")
    else:
        report = {"command": "train", "status": "finished", "configuration": {"data_train": str(run / "data")}}
        (run / "run.json").write_text(json.dumps(report))
    before = {path for path in tree(run) if path.startswith("data/")}
    assert mh.clean(folder=run, yes=True).removed
    assert {path for path in tree(run) if path.startswith("data/")} == before


def test_a_folder_of_somebody_else_is_passed_over_aloud(tmp_path, monkeypatch):
    mine, theirs = make_run(tmp_path / "mine"), make_run(tmp_path / "theirs")
    monkeypatch.setattr(disk.os, "access", lambda path, mode: path != theirs)
    result = mh.clean(folder=tmp_path, yes=True)
    assert [item.folder for item in result.found] == [mine] and "cannot be read" in result.kept[theirs]


def test_a_cleaned_run_still_has_its_networks_and_says_why_it_cannot_go_on(tmp_path, monkeypatch):
    small_networks(monkeypatch)
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", num_workers=0)
    assert train.run(config) == 0
    before = read_checkpoint_params(tmp_path / "run/checkpoints/last")
    assert mh.clean(folder=tmp_path / "run", yes=True).removed
    assert {p.name for p in (tmp_path / "run/checkpoints/last").iterdir()}.isdisjoint(("optimizer", "data"))
    assert str(read_checkpoint_params(tmp_path / "run/checkpoints/last")) == str(before)
    with pytest.raises(CheckpointError, match="and last after mambahome clean"):
        train.run(replace(config, resume=True))


@pytest.mark.parametrize("status", ["running", "stopped by a signal", "RUN/checkpoints: cannot be written"])
def test_an_unfinished_run_keeps_all_that_resume_reads(tmp_path, status):
    run = make_run(tmp_path / "runs/a", status, stored=True)
    before = tree(tmp_path)
    write(run / "checkpoints/last.partial.orbax-checkpoint-tmp/model/a")
    write(run / ".run.json.12-34.partial.json")
    write(run / "checkpoints/best.previous/config.json")
    result = mh.clean(folder=tmp_path, yes=True)
    assert tree(tmp_path) == before
    assert list(result.kept) == [run] and "so --resume needs what is there" in result.kept[run]


def test_parts_of_an_unfinished_training_stay_and_those_of_a_finished_one_go(tmp_path):
    for name, status in (("done", "finished"), ("stopped", "stopped by a signal")):
        make_run(tmp_path / name / "member_0")
        (tmp_path / name / "run.json").write_text(json.dumps({"command": "train", "members": 1, "status": status}))
    stopped = tree(tmp_path / "stopped")
    result = mh.clean(folder=tmp_path, yes=True)
    assert list(result.kept) == [tmp_path / "stopped"] and tree(tmp_path / "stopped") == stopped
    assert [item.folder for item, _ in result.removed] == [tmp_path / "done/member_0"]
    assert list(mh.clean(folder=tmp_path / "stopped/member_0", yes=True).kept) == [tmp_path / "stopped"]
    assert tree(tmp_path / "stopped") == stopped


def test_a_run_in_use_is_left_alone(tmp_path):
    run = make_run(tmp_path / "run", stored=True)
    before = tree(run)
    with locked(run, "train"):
        result = mh.clean(folder=tmp_path, yes=True)
        assert "`mambahome train` (process" in result.kept[run] and not result.found
    assert tree(run) == before
    # Taken after it was listed.
    listed = disk.find_removable(CleanConfig(run))
    with locked(run, "train"):
        assert disk.remove(CleanConfig(run), listed).exit_code == 1 and tree(run) - {LOCK} == before
    (run / "run.json").write_text(json.dumps({"command": "train", "status": "running"}))
    result = disk.remove(CleanConfig(run), listed)
    assert tree(run) == before and not result.removed and "changed since it was listed" in result.failed[run]


def test_a_checkpoint_that_a_crash_left_aside_is_removed_only_beside_a_whole_one(tmp_path):
    run = make_run(tmp_path / "run", "running")
    for name in ("last", "best"):
        for item in ("config.json", "model/a"):
            write(run / "checkpoints" / f"{name}.previous" / item)
    (run / "checkpoints/best/config.json").unlink()
    mh.clean(folder=run, yes=True)
    assert {path.name for path in (run / "checkpoints").glob("*.previous")} == {"best.previous"}


def test_leftovers_of_killed_commands_go_and_what_is_not_ours_stays(tmp_path):
    ours = [
        "ready/store/.a.12.partial/image",
        "ready/store/.a.12.old/case.json",
        "ready/images/.a.nii.gz.1-2.partial.gz",
    ]
    ours += ["results/.volumes.csv.1-2.partial.csv", "results/previews/.a.png.1-2.partial.png", "results/.77.probe"]
    theirs = ["ready/dataset.json", "ready/store/a/case.json", "ready/store/.hidden.old", "results/a.partial"]
    theirs += [
        "results/a.nii.gz",
        "plain/.a.12.partial",
        "plain/last.partial/model/a",
        "plain/checkpoints/last/optimizer/a",
    ]
    theirs += ["plain/run.json", f"results/{LOCK}", "plain/mosaic/a.mlirbc"]
    for name in (*ours, *theirs):
        write(tmp_path / name)
    outside = write(tmp_path.parent / f"{tmp_path.name}-outside/optimizer/a")
    run = make_run(tmp_path / "linked")
    linked = tree(run)
    (run / "checkpoints/last/more").symlink_to(outside.parent)
    (tmp_path / "ready/link").symlink_to(outside.parent.parent)
    result = mh.clean(folder=tmp_path, yes=True)
    assert not [name for name in ours if (tmp_path / name).exists()]
    # The lock's file of a dead command goes with its leftovers.
    assert [name for name in theirs if not (tmp_path / name).exists()] == [f"results/{LOCK}"]
    assert outside.exists() and linked - tree(run) == {
        f"checkpoints/{name}/{item}/a" for name in ("last", "step_00000004") for item in ("optimizer", "data")
    }
    assert {item.folder.name for item, _ in result.removed} == {"ready", "results", "linked"}


def test_only_what_is_older(tmp_path):
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new")
    for path in (*old.rglob("*"), old):
        os.utime(path, (0, time.time() - 3 * 24 * 3600))
    result = mh.clean(folder=tmp_path, older_than=2, yes=True)
    assert [item.folder for item, _ in result.removed] == [old]
    assert (new / "checkpoints/last/optimizer").is_dir()


def test_compiled_programs_go_but_of_a_folder_that_the_user_names_our_kernels_alone(tmp_path, monkeypatch, capsys):
    own, named = tmp_path / "home/mambahome/xla", tmp_path / "shared"
    files = ["jit_a-12ab-cache", "jit_a-12ab-atime", "xla_gpu_per_fusion_autotune_cache_dir/a", "mosaic/b.mlirbc"]
    for folder in (own, named):
        for name in (*files, "mosaic/tmpab", "notes.txt", "mosaic/readme"):
            write(folder / name)
    monkeypatch.setattr(disk, "program_cache", lambda: own)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(named))
    assert command.run(CleanConfig(yes=True)) == 0
    text = capsys.readouterr().out
    assert f"Kept {named}: JAX_COMPILATION_CACHE_DIR" in text and "Removed 0.0 MB" in text
    assert "programs compiled by JAX; without: the next training compiles them anew" in text
    assert tree(own) == {"notes.txt", "mosaic/readme"}
    assert tree(named) == {*files, "notes.txt", "mosaic/readme"} - {"mosaic/b.mlirbc"}
    assert devices.program_cache is not disk.program_cache


def test_what_cannot_be_removed_stops_nothing_else(tmp_path, monkeypatch, capsys):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    discard = disk._discard

    def fail(path):
        if first in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        discard(path)

    monkeypatch.setattr(disk, "_discard", fail)
    assert command.run(CleanConfig(tmp_path, yes=True)) == 1
    assert f"Not removed: {first / 'checkpoints/last'}" in capsys.readouterr().out
    assert (first / "checkpoints/last/optimizer").is_dir() and not (second / "checkpoints/last/optimizer").exists()


def test_wrong_usage(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        mh.clean(folder=tmp_path / "none")
    with pytest.raises(ConfigError, match="--older_than -1"):
        mh.clean(folder=tmp_path, older_than=-1)


def test_a_question_in_a_terminal(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    answers = iter(("", "y"))
    monkeypatch.setattr(command.Console, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(command.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(command.Console, "input", lambda *_, **__: next(answers))
    assert command.run(CleanConfig(run)) == 0 and (run / "checkpoints/last/optimizer").is_dir()
    assert command.run(CleanConfig(run)) == 0 and not (run / "checkpoints/last/optimizer").exists()


def test_half_written_files_of_a_command_that_runs_are_not_listed(tmp_path):
    ready = tmp_path / "ready"
    writing = [write(ready / "store/.a.12.partial/image"), write(ready / ".dataset.json.1-2.partial.json")]
    with locked(ready, "preprocess"):
        writing = [write(path) for path in writing]
        result = mh.clean(folder=tmp_path, yes=True)
        assert list(result.kept) == [ready] and not result.found
        assert all(path.exists() for path in writing)


def test_links_to_runs_are_not_followed_and_parts_are_listed_once(tmp_path):
    outside = make_run(tmp_path / "outside/run")
    before = tree(outside)
    run = make_run(tmp_path / "runs/a", stored=True)
    (tmp_path / "runs/link").symlink_to(outside)
    for name in ("data/store/.a.12.partial/image", "validation/.metrics.csv.1-2.partial.csv"):
        write(run / name)
    for name in ("metrics.csv", "summary.json"):
        write(run / "validation" / name)
    found = mh.clean(folder=tmp_path / "runs", yes=True).found
    listed = sorted(path.name for item in found for path in item.paths if path.name[0] == ".")
    assert listed == [".a.12.partial", ".metrics.csv.1-2.partial.csv"]
    assert tree(outside) == before and {item.folder for item in found} == {run}
