"""The flags of an earlier run, out of its run.json, to run it again. Nothing here imports jax."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mambahome_jax.config import BEFORE_THERE_WERE
from mambahome_jax.errors import ConfigError
from mambahome_jax.support.files import parse_json
from mambahome_jax.support.paths import local_path, real_path

# Of where and how a run was started, not of what it computes.
_NOT_AGAIN = ("config", "resume", "load_checkpoint", "coordinator_address", "num_processes", "process_id")


def with_earlier_flags(
    command: str, arguments: Sequence[str], names: Sequence[str], paths: Collection[str] = ()
) -> list[str]:
    """Arguments (`--name value ...`, as `normalise_arguments` gives them), with those of the run of `--config FILE`.

    names: of the command's flags; paths: those that are paths, which are read from where the earlier run worked. A flag
    among the arguments wins. Without --output_dir, and without --resume, the run goes into a folder beside the earlier
    one.
    Raises ConfigError: no such file, or not the report of a run of this command.
    """
    given = {word.partition("=")[0]: number for number, word in enumerate(arguments) if word.startswith("--")}
    if "--config" not in given:
        return list(arguments)
    word = arguments[given["--config"]]
    following = arguments[given["--config"] + 1 :]
    path = local_path(word.partition("=")[2] or (following[0] if following else ""))
    earlier = _configuration(path, command, names, paths)
    wanted = {name: value for name, value in earlier.items() if f"--{name}" not in given and name not in _NOT_AGAIN}
    if not {"--output_dir", "--resume", "--load_checkpoint"} & set(given):
        wanted["output_dir"] = str(_beside(path.parent))
    again = [part for name, value in wanted.items() if value not in (None, "", []) for part in _words(name, value)]
    return [*again, *arguments]


def _configuration(path: Path, command: str, names: Sequence[str], paths: Collection[str]) -> dict[str, Any]:
    expected = f"run.json of a run of `mambahome {command}`"
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror or error}; expected {expected}") from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: not valid JSON ({error}); expected {expected}") from error
    found = content.get("command") if isinstance(content, dict) else None
    configuration = content.get("configuration") if found == command else None
    if not isinstance(configuration, dict):
        raise ConfigError(f"--config {path}: of command {found!r}; expected {expected}")
    unknown = sorted(set(configuration) - set(names))
    if unknown:
        action = "It is of another version; give the flags themselves"
        raise ConfigError(f"--config {path}: unknown flags {', '.join(unknown)}. {action}")
    above = content.get("working_folder")
    home = path.parent / above if isinstance(above, str) else Path()
    if home.is_dir() and not Path.cwd().samefile(home):
        configuration |= {name: _from(home, value) for name, value in configuration.items() if name in paths}
    return BEFORE_THERE_WERE | configuration if command == "train" else configuration


def _from(home: Path, value: Any) -> Any:
    """A path of the flags, or several, as seen from a folder; text that stands for none stays."""
    if isinstance(value, list):
        return [_from(home, part) for part in value]
    return str(local_path(home / value)) if isinstance(value, str) and value not in ("", "False") else value


def _words(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def _beside(folder: Path) -> Path:
    """The first of FOLDER_2, FOLDER_3, ... that is not there."""
    home = folder if folder.name not in ("", "..") else real_path(folder)
    number = 2
    while home.with_name(f"{home.name}_{number}").exists():
        number += 1
    return home.with_name(f"{home.name}_{number}")
