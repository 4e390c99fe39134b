"""--config: the flags of an earlier run, but for those given now."""

import json
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.files import jsonable
from mambahome_jax.support.paths import working_folder

CONFIG = TrainConfig(
    Path("some data"),
    output_dir=Path("runs/one"),
    patch_size=(32, 16, 16),
    mirror=("LR", "AP"),
    lr=3e-4,
    augment=False,
    resume=True,
    use_checkpoint=True,
    process_id=3,
)


def _report(folder, **changes):
    content = {"command": "train", "configuration": jsonable(vars(CONFIG))} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content))
    return str(folder / "run.json")


def test_the_flags_of_an_earlier_run_and_those_given_win(tmp_path):
    file = _report(tmp_path / "one")
    again = cli.parse("train", ["--config", file], "mambahome")
    expected = {"output_dir": tmp_path / "one_2", "config": Path(file), "resume": False, "process_id": None}
    assert vars(again) == vars(CONFIG) | expected
    (tmp_path / "one_2").mkdir()
    again = cli.parse("train", [f"--config={file}", "--lr", "1", "--patch-size", "16", "16", "16"], "mambahome")
    assert (again.lr, again.patch_size, again.output_dir) == (1.0, (16, 16, 16), tmp_path / "one_3")
    assert cli.parse("train", ["--config", file, "--output_dir", "x"], "mambahome").output_dir == Path("x")
    assert cli.parse("train", ["--config", file, "--resume"], "mambahome").output_dir == Path("runs/one")


def test_paths_are_read_where_the_earlier_run_worked(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    here.mkdir()
    (there / "runs/one").mkdir(parents=True)
    monkeypatch.chdir(there)
    assert (working_folder(there / "runs/one"), working_folder(here)) == ("../..", None)
    configuration = jsonable(vars(CONFIG)) | {"use_pretrained": "w.pth", "data_val": "/abs/val"}
    file = _report(there / "runs/one", working_folder="../..", configuration=configuration)
    assert cli.parse("train", ["--config", file], "mambahome").data_train == Path("some data")
    monkeypatch.chdir(here)
    again = cli.parse("train", ["--config", "../there/runs/one/run.json"], "mambahome")
    assert (again.data_train, again.data_val) == (there / "some data", Path("/abs/val"))
    assert again.use_pretrained == str(there / "w.pth")
    assert cli.parse("train", ["--config", file, "--data_train", "x"], "mambahome").data_train == Path("x")
    # A report that does not say, as one of an earlier version.
    file = _report(tmp_path / "one", working_folder=None)
    assert cli.parse("train", ["--config", file], "mambahome").data_train == Path("some data")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": "infer"}, "of command 'infer'; expected run.json of a run of `mambahome train`"),
        ({"configuration": {"colour": 1}}, "unknown flags colour. It is of another version"),
        ({"configuration": [1]}, "expected run.json of"),
    ],
)
def test_what_is_no_report_of_a_training_is_refused(tmp_path, changes, words, capsys):
    file = _report(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        cli.parse("train", ["--config", file], "mambahome")
    assert file in str(caught.value) and words in str(caught.value)
    (tmp_path / "run.json").write_text("{")
    for name in (file, str(tmp_path / "nowhere.json"), ""):
        assert cli.run_command("train", ["--config", name], "train.py") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "not valid JSON" in said[0] and "No such file" in said[1]


def test_a_report_from_before_there_was_dropout_is_of_a_run_without(tmp_path):
    configuration = jsonable(vars(CONFIG))
    assert cli.parse("train", ["--config", _report(tmp_path)], "mambahome").dropout is None
    del configuration["dropout"]
    assert cli.parse("train", ["--config", _report(tmp_path, configuration=configuration)], "mambahome").dropout == 0
