"""The command line: flags from the dataclasses of flags.py, errors of the user to a message and an exit code.

Exit codes: 0 all done, 1 some cases failed, 2 wrong usage or nothing could be done (train adds 128 + signal).
Arguments are parsed before anything heavy is imported, so that --help is instant.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambahome_jax.errors import ConfigError, MambaHomeError
from mambahome_jax.support.console import protect_output, say
from mambahome_jax.support.paths import typed_path
from mambahome_jax.version import __version__

# The class of a command's flags is flags.<Command>Config, what it does is run() of commands/<command>.py.
COMMANDS = {
    "check": "List what is wrong with a dataset, and plan its settings",
    "plan": "Show the settings that follow from a dataset, and why",
    "preprocess": "Reorient and resample a folder of scans",
    "train": "Train a network on a preprocessed folder",
    "infer": "Segment scans",
    "evaluate": "Score segmentations against references",
    "report": "Write an HTML page about an evaluation",
    "duel": "Train networks under the same conditions, and compare them",
    "convert": "Convert weights to .pth, .npz, .safetensors or for a model hub",
    "export": "Write a model as one file for deployment",
    "clean": "List and remove what runs and killed commands left on the disk",
    "demo": "See the whole way work on synthetic scans, in a few minutes",
}
_COMPILING = ("train", "infer", "duel")
_REMOVED = {
    "train": {
        "--config": 'run.json holds all flags of a run under "configuration"; give those that you need',
        "--schedule_step": "the schedule steps after the last update of an epoch",
        "--label_smoothing": "it brought nothing; leave it out",
        "--momentum": "SGD has none, or 0.99 with --recipe strong; leave it out",
    },
    "infer": {"--overwrite": "every scan is segmented again; --skip_existing keeps results that are there and whole"},
}
_HELP = ("-h", "--help")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def flags_of(command: str) -> Any:
    """Return the dataclass of a command's flags."""
    return getattr(importlib.import_module("mambahome_jax.flags"), f"{command.capitalize()}Config")


def normalise_arguments(command: str, argv: Sequence[str]) -> list[str]:
    """Spell what the published scripts accept as tyro reads it.

    A bare boolean flag is True, True and False may have any case, dashes stand for underscores, and
    `--use_pretrained False` is none. Raises ConfigError: a flag that there is not, or no longer.
    """
    from mambahome_jax import usage

    known = {f"--{name}": flag for name, flag in usage.flags(flags_of(command)).items()}
    alone = not any(flag.argument for flag in known.values())
    out: list[str] = []
    arguments = list(argv)
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if reason := _REMOVED.get(command, {}).get(name):
            raise ConfigError(f"{name} is no longer a flag: {reason}")
        if name not in known:
            near = usage.nearest(name, known)
            raise ConfigError(f"{name}: {command} has no such flag. {near}--help lists all of them")
        flag = known[name]
        following = value if equals else (arguments[0] if arguments else None)
        spelled = following.lower() if following is not None else ""
        if flag.item is bool:
            # Behind a flag a word such as 1 may be the folder that the command takes.
            told = spelled in (_TRUE + _FALSE if equals or alone else ("true", "false"))
            if not told and (equals or (alone and following is not None and not following.startswith("--"))):
                raise ConfigError(flag.refuse([following or "''"]))
            if not equals and told:
                arguments.pop(0)
            out += [name, "False" if spelled in _FALSE else "True"]
        elif name == "--use_pretrained" and spelled in ("false", "none", ""):
            if not equals and arguments:
                arguments.pop(0)
        else:
            # tyro would take a path that begins with a dash for a flag.
            is_path = flag.item is Path or name == "--use_pretrained"
            value = f"./{value}" if is_path and value.startswith("-") else value
            out += [name, value] if equals else [name]
    return out


def _read(config: type, words: Sequence[str]) -> Any:
    """Make an object of a class of flags; raises ConfigError with what tyro says where the words do not fit."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    def path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: typed_path(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    registry = ConstructorRegistry()
    registry.primitive_rule(path_rule)
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            config_marks = (tyro.conf.FlagConversionOff,)
            return tyro.cli(config, args=words, use_underscores=True, config=config_marks, registry=registry)
    except SystemExit as ended:
        raise ConfigError(refused.getvalue().strip()) from ended


def parse(command: str, argv: Sequence[str]) -> Any:
    """Return the configuration of a command from its arguments.

    Raises ConfigError: flags and values that the command does not take, a path that cannot be opened.
    """
    from mambahome_jax import usage

    words, config = normalise_arguments(command, argv), flags_of(command)

    def reads(kind: type, words: Sequence[str]) -> bool:
        try:
            return bool(_read(kind, words))
        except ConfigError:
            return False

    try:
        settings = _read(config, words)
    except ConfigError as error:
        if not isinstance(error.__cause__, SystemExit):
            raise
        raise ConfigError(usage.why_refused(config, words, reads) or str(error)) from error
    if hasattr(settings, "given"):
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        settings = dataclasses.replace(settings, given=tuple(sorted(given)))
    weights = getattr(settings, "use_pretrained", "")
    return dataclasses.replace(settings, use_pretrained=str(typed_path(weights))) if weights else settings


def run_command(command: str, argv: Sequence[str], prog: str) -> int:
    """Parse and run a command; an error of the user becomes a message on stderr and exit code 2."""
    started = time.monotonic()
    # JAX keeps those alone that took a second; the hundreds of small ones take ten seconds on a GPU together.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        if argv[:1] == ["--version"]:
            return _say_version(verbose="--verbose" in argv)
        if asked := next((word for word in argv if word in _HELP), None):
            from mambahome_jax.usage import help_text

            print(help_text(flags_of(command), prog, brief=asked == "-h"))
            return 0
        settings = parse(command, argv)
        _keep_programs(command)
        run = importlib.import_module(f"mambahome_jax.commands.{command}").run
        return run(settings, started) if command == "train" else run(settings)
    except MambaHomeError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        if "jax" in sys.modules:
            # A thread of XLA that still compiles would crash the interpreter as it ends.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130


def _keep_programs(command: str) -> None:
    """Name JAX the folder for compiled programs, unless the user does or there is none."""
    from mambahome_jax.support.devices import program_cache

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = program_cache()
    if folder is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    elif command in _COMPILING:
        text = "no home folder that can be written, so compiled programs are not kept for the next start"
        print(f"Note: {text}; JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr)


def _say_version(verbose: bool) -> int:
    print(f"mambahome {__version__}")
    if verbose:
        importlib.import_module("mambahome_jax.support.devices").print_versions()
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mambahome COMMAND ...`."""
    protect_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        raise SystemExit(_say_version(verbose="--verbose" in arguments))
    if not arguments or arguments[0] in _HELP:
        print("usage: mambahome COMMAND [flags]\n")
        print("\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items()))
        print("\n  COMMAND -h    List its most used flags; --help lists all of them")
        print("  --version     Print the version; with --verbose JAX and the devices too")
        print("  --completion  Print a script for bash, zsh or fish that completes words")
        raise SystemExit(0 if arguments else 2)
    command = arguments.pop(0)
    if command in COMMANDS:
        raise SystemExit(run_command(command, arguments, f"mambahome {command}"))
    from mambahome_jax import usage

    if command == "--complete":
        for word in usage.completions({name: flags_of(name) for name in COMMANDS}, arguments):
            print(word)
    elif command == "--completion" and len(arguments) == 1 and arguments[0] in usage.COMPLETION:
        print(usage.COMPLETION[arguments[0]], end="")
    elif command == "--completion":
        error = f"--completion {' '.join(arguments)}".strip()
        raise SystemExit(_refuse(f"{error}; expected one of {', '.join(usage.COMPLETION)}"))
    else:
        near = usage.nearest(command, COMMANDS)
        raise SystemExit(_refuse(f"{command}: no such command. {near}mambahome --help lists all of them"))
    raise SystemExit(0)


def _refuse(reason: object) -> int:
    if sys.stderr.isatty():
        from rich.console import Console

        say(Console(stderr=True), f"Error: {reason}")
    else:
        print(f"Error: {reason}", file=sys.stderr)
    return 2


def script(command: str) -> None:
    """Run a command for preprocess.py, train.py and infer.py."""
    protect_output()
    raise SystemExit(run_command(command, sys.argv[1:], f"python {command}.py"))
