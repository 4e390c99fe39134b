"""Help in groups, mistakes in our own words, and completion in the shells."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest

from mambahome_jax import cli, usage
from mambahome_jax.errors import ConfigError

CONFIGS = {command: cli.flags_of(command) for command in cli.COMMANDS}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_flag_is_in_a_group_and_says_what_it_does(command):
    config = CONFIGS[command]
    flags = [flag for group in usage.groups(config).values() for flag in group]
    fields = [field.name for field in dataclasses.fields(config) if field.name != "given"]
    assert [flag.name for flag in flags] == fields and all(flag.text for flag in flags)
    first, *_ = usage.groups(config).values()
    assert {flag.name for flag in flags if flag.required} <= {flag.name for flag in first} and len(first) <= 10


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", CONFIGS)
def test_help_fits_the_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = usage.help_text(CONFIGS[command], f"mambahome {command}", brief=False)
    assert all(len(line) <= columns for line in text.splitlines())
    flags = usage.flags(CONFIGS[command]).values()
    assert all(text.count(f"\n  {flag}") >= 1 for flag in flags)


def test_the_list_of_commands_fits_80_columns(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["-h"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and {line.split()[0] for line in lines if line.strip()} >= {*cli.COMMANDS}


def test_brief_help_has_the_first_group_alone_and_names_the_others(capsys):
    for word, length in (("-h", 45), ("--help", 200)):
        assert cli.run_command("train", ["--epochs", "x", word], "mambahome train") == 0
        said = capsys.readouterr().out
        assert "usage: mambahome train --data_train PATH [flags]" in said and len(said.splitlines()) < length
        assert ("\nAugmentation:\n" in said, "more flags" in said) == (word == "--help", word == "-h")
        assert "(default: 800)." in said and "Output folder of preprocess" in said


def test_the_usage_tells_what_may_be_left_out():
    for command, line in (("clean", "clean [FOLDER] [flags]"), ("convert", "convert SOURCE DESTINATION [flags]")):
        text = usage.help_text(CONFIGS[command], f"mambahome {command}", brief=True)
        assert text.startswith(f"usage: mambahome {line}\n")


def _refusal(command, text):
    with pytest.raises(ConfigError) as refused:
        cli.parse(command, text.split())
    return str(refused.value)


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("train", "", "--data_train PATH is missing; -h lists the most used flags"),
        ("train", "READY", "READY: no flag stands before it. Did you mean --data_train READY?"),
        ("train", "--data_train", "--data_train has no value; expected a path"),
        ("train", "--data_train a --epochs x", "--epochs x; expected a whole number"),
        ("train", "--data_train a --epochs 3 --epochs x", "--epochs x; expected a whole number"),
        ("train", "--data_train a --lr=", "--lr has no value; expected a number"),
        ("train", "--data_train a --epochs 3 4", "--epochs 3 4; expected a whole number"),
        ("train", "--data_train a --patch_size 48 48", "--patch_size 48 48; expected 3 whole numbers"),
        (
            "train",
            "--data_train a --recipe strnog",
            "--recipe strnog; expected published, strong or nnunet. Did you mean strong?",
        ),
        ("train", "--data_train a --mirror LR BA", "--mirror LR BA; expected none, LR, AP or IS"),
        ("train", "--data_train a --resume maybe", "--resume maybe; expected True or False"),
        ("train", "--data_train a --resume=", "--resume ''; expected True or False"),
        ("train", "-epochs 3", "-epochs: no such flag. Did you mean --epochs? --help lists all of them"),
        (
            "infer",
            "--data_path a --model_path b --modality CT",
            "--modality CT; expected ct, mr or us. Did you mean ct?",
        ),
        ("check", "scans --show", "--show has no value; expected a whole number"),
        ("check", "--fast scans --show x more", "--show x; expected a whole number"),
        ("convert", "a", "DESTINATION is missing; -h lists the most used flags"),
        ("convert", "--overwrite a b c", "c: one word too many; expected SOURCE DESTINATION"),
        ("clean", "a b", "b: one word too many; expected FOLDER"),
        (
            "evaluate",
            "--predictions a",
            "--references PATH and --output_dir PATH are missing; -h lists the most used flags",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(command, text, message):
    assert _refusal(command, text) == message


COMPLETED = [
    ("mambahome tr", ["train"]),
    ("mambahome train --re", ["--recipe", "--resume"]),
    ("mambahome train --recipe ", ["published", "strong", "nnunet"]),
    ("mambahome train --recipe s", ["strong"]),
    ("mambahome train --epochs ", []),
    ("mambahome convert --overwrite sca", []),
    ("mambahome train --data_train a", []),
    ("mambahome check ", []),
    ("mambahome dance --re", []),
]


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
def test_the_last_word_is_completed(line, expected, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--complete", *line.split(" ")[1:]])
    assert capsys.readouterr().out.split() == expected


def test_what_comes_next_where_several_words_may():
    def offered(text):
        return usage.completions(CONFIGS, text.split(" "))

    assert offered("")[:2] == ["check", "plan"]
    assert "--epochs" in offered("train ") and "--epochs" in offered("train --resume ")
    assert offered("train --mirror LR ")[:5] == ["none", "LR", "AP", "IS", "--data_train"]
    assert offered("train --parallel ") == ["True", "False"]
    assert offered("infer --model_path a ") == []


BASH = 'eval "$(mambahome --completion bash)"; COMP_WORDS=({}"{}"); COMP_CWORD={}; _mambahome; echo "${{COMPREPLY[@]}}"'
FISH = "mambahome --completion fish | source; for line in {}; complete -C $line; end"


@pytest.fixture
def path_with_the_program(tmp_path):
    program = tmp_path / "bin" / "mambahome"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mambahome_jax "$@"\n')
    program.chmod(0o755)
    (tmp_path / "my scans").mkdir()
    return {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_asks_the_program(path_with_the_program, tmp_path):
    lines = []
    for line, _ in COMPLETED[:3]:
        *before, last = line.split(" ")
        lines.append(BASH.format("".join(f"{word} " for word in before), last, len(before)))
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, env=path_with_the_program)
    assert [line.split() for line in done.stdout.splitlines()] == [words for _, words in COMPLETED[:3]]
    assert done.stderr == ""


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_asks_the_program_and_else_offers_files(path_with_the_program, tmp_path):
    lines = FISH.format("'mambahome train --re' 'mambahome check my'")
    done = subprocess.run(
        ["fish", "-c", lines], capture_output=True, text=True, env=path_with_the_program, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["--recipe", "--resume", "my scans/"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_can_read_its_script():
    done = subprocess.run(["zsh", "-n"], input=usage.COMPLETION["zsh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_a_shell_without_a_script_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--completion", *words])
    assert capsys.readouterr().err.endswith("; expected one of bash, zsh, fish\n")
