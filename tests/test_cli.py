"""The command line: published spellings, instant help, messages without tracebacks, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.version import __version__

ROOT = Path(__file__).resolve().parent.parent


def _parse(command, text):
    return cli.parse(command, text.split())


def test_the_published_command_lines_are_understood():
    config = _parse(
        "train",
        "--data_train a --data_val b --batch_size 2 --classes 3 --epochs 800 --lr 1e-4 --weight_decay 1e-4 "
        "--optimizer AdamW --scheduler CALR --patch_size 128 128 128 --feature_size 48 --use_checkpoint False "
        "--num_workers 12 --pin_memory True --use_pretrained False --load_checkpoint False --checkpoint_name MambaHoME "
        "--model MambaHoME --parallel True --num_devices 4 --strategy ddp",
    )
    assert config.patch_size == (128, 128, 128)
    assert config.use_checkpoint is False
    assert config.load_checkpoint is False
    assert config.use_pretrained == ""
    assert (config.lr, config.num_devices, config.checkpoint_name) == (1e-4, 4, "MambaHoME")
    config = _parse("preprocess", "--input_path a --output_path b --spacing 0.8 0.8 -1")
    assert config.spacing == (0.8, 0.8, -1.0)
    config = _parse(
        "infer",
        "--data_path a --model_path w.pth --output_dir o --roi_size 192 192 48 --sw_batch_size 4 --num_workers 4 "
        "--overlap 0.5 --gpu",
    )
    assert config.gpu
    assert config.roi_size == (192, 192, 48)
    assert config.model_path == Path("w.pth")


def test_options_of_infer():
    config = _parse(
        "infer",
        "--data_path a --model_path one two three --tta --labels liver spleen --keep_largest all --skip-existing True "
        "--save_probabilities",
    )
    assert config.model_path == (Path("one"), Path("two"), Path("three"))
    assert (config.labels, config.keep_largest) == (("liver", "spleen"), ("all",))
    assert config.tta and config.skip_existing and config.save_probabilities


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--use_checkpoint", True),
        ("--use_checkpoint true --lr 1", True),
        ("--use-checkpoint=FALSE", False),
        ("", False),
    ],
)
def test_booleans(text, expected):
    assert _parse("train", f"--data_train a {text}").use_checkpoint is expected


def test_positional_arguments():
    for words, yes, folder in (("--yes 1", True, "1"), ("--yes=1", True, None), ("--yes False runs", False, "runs")):
        config = _parse("clean", words)
        assert (config.yes, config.folder) == (yes, folder and Path(folder)), words
    config = _parse("convert", "a.pth b.npz --overwrite")
    assert (config.source, config.destination, config.overwrite) == (Path("a.pth"), Path("b.npz"), True)


# What takes most of a second or more to import; a user who asks for help waits for none of it.
HEAVY = {"jax", "flax", "orbax", "grain", "optax", "tensorstore", "scipy", "nibabel", "SimpleITK", "PIL", "jinja2"}


def _imported(command):
    """What a command prints, and the packages that it imports."""
    line = [sys.executable, "-X", "importtime", *map(str, command)]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    modules = [
        text.rpartition("|")[2].strip() for text in result.stderr.splitlines() if text.startswith("import time:")
    ]
    assert len(modules) > 20
    return result.stdout, {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("line", [("-c", "import mambahome_jax"), ("-m", "mambahome_jax", "--help")])
def test_import_and_help_load_little_of_the_standard_library_and_nothing_else(line):
    added = _imported(line)[1] - _imported(["-c", "pass"])[1]
    added -= {"org"}  # of Jython, which module copy asks for
    assert "mambahome_jax" in added and added <= {*sys.stdlib_module_names, "mambahome_jax"} and len(added) < 50


@pytest.mark.parametrize("script", ["preprocess.py", "train.py", "infer.py"])
def test_help_is_instant(script):
    printed, packages = _imported([ROOT / script, "--help"])
    assert "usage" in printed and not packages & HEAVY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("preprocess", "--input_path", "nowhere", "--output_path", "out"), "Error: nowhere: no such folder"),
        (("convert", "nothing.pth", "out.npz"), "Error: nothing.pth: no such file"),
        (("infer", "--data_path", "nowhere", "--model_path", "w.pth"), "Error: nowhere: no such file or folder"),
        (("train", "--data_train", "nowhere"), "Error: nowhere: no such folder"),
        (("evaluate", "--predictions", "p", "--references", "r", "--output_dir", "o"), "Error: p: no such folder"),
        (("report", "--evaluation", "e"), "Error: e/metrics.csv: no such file; expected an evaluation"),
        (("train",), "--data_train"),
        (
            ("train", "--data_train", "d", "--label-smoothing", "0.1"),
            "--label_smoothing is no longer a flag: it",
        ),
        (("train", "--config=run.json"), "Error: --config is no longer a flag: run.json holds all flags of a run"),
        (("infer", "--overwrite", "False"), "Error: --overwrite is no longer a flag: every scan is segmented again"),
        (
            ("train", "--data_trian", "d"),
            "Error: --data_trian: train has no such flag. Did you mean --data_train? --help lists all of them\n",
        ),
        (("train", "--data", "d"), "--data: train has no such flag. Did you mean --data_train or --data_val? --help"),
        (("infer", "--zzzz=1"), "Error: --zzzz: infer has no such flag. --help lists all of them\n"),
        (("preprocess", "--input_path", "scan", "--output_path", "o"), "no such folder. Did you mean scans?\n"),
        (("check", "nowhere"), "Error: nowhere: no such folder. Check the path.\n"),
        (("dance",), "Error: dance: no such command. mambahome --help lists all of them\n"),
        (("trian",), "Error: trian: no such command. Did you mean train? mambahome"),
    ],
)
def test_mistakes_give_a_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # so that it is put back afterwards
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert message in printed.err and "Traceback" not in printed.err


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "mambahome_jax", "preprocess", "--input_path", "nowhere", "--output_path", "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: nowhere: no such folder") and "Traceback" not in result.stderr


def test_an_interrupt_waits_for_no_thread_of_jax():
    """One that compiled crashed the interpreter at its end: exit code -11."""
    code = (
        "import atexit, sys; from mambahome_jax import cli; from mambahome_jax.commands import check\n"
        "def run(config): raise KeyboardInterrupt\n"
        "check.run, sys.modules['jax'] = run, None; atexit.register(print, 'ended as usual')\n"
        "print('so far'); cli.main(['check', '.'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "so far\n", "Stopped.\n")


def test_every_compiled_program_is_kept_in_the_users_cache_folder_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--data_path", str(tmp_path / "none"), "--model_path", "none", "--output_dir", str(tmp_path / "out")]
    assert cli.run_command("infer", arguments, "infer") == 2
    assert [os.environ[name] for name in names[:2]] == [str(tmp_path / "mambahome" / "xla"), "0"]
    monkeypatch.setenv(names[0], "mine")
    monkeypatch.setenv(names[1], "3")
    assert cli.run_command("infer", arguments, "infer") == 2
    assert [os.environ[name] for name in names[:2]] == ["mine", "3"]


@pytest.mark.parametrize("command", [["-m", "mambahome_jax"], ["-m", "mambahome_jax", "check"], [ROOT / "train.py"]])
def test_the_version_is_instant(command):
    printed, packages = _imported([*command, "--version"])
    assert printed == f"mambahome {__version__}\n" and not packages & HEAVY


def test_a_verbose_version_names_what_a_report_needs(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version", "--verbose"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("mambahome ", "python ", "jax ", "devices: ", "compiled programs: "))
