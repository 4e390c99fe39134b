"""Keywords of functions, at run time and as type checkers see them: keywords.pyi, which running this module writes."""

import dataclasses
import inspect
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

import mambahome_jax as mh
from mambahome_jax import config, flags
from mambahome_jax.errors import ConfigError
from mambahome_jax.inference.segment import SegmentOptions
from mambahome_jax.support.keywords import from_keywords
from tests.conftest import ROOT

STUB = ROOT / "mambahome_jax" / "keywords.pyi"
COMMANDS = ("check", "plan", "preprocess", "train", "infer", "evaluate", "report", "duel", "export", "clean")
HEAD = '''"""Keywords of functions for type checkers, by `python -m tests.typing.test_keywords`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Required, TypedDict

from .config import (
{aliases}
)

StrPath = str | Path
'''
ALIASES = {
    value: name for name, value in vars(config).items() if get_origin(value) is Literal and not name.startswith("_")
}


def kinds() -> dict[str, tuple[type, tuple[str, ...]]]:
    """Name of the stub's class -> dataclass of the keywords, and fields that are no keywords."""
    networks = {"SegMambaShape": config.SegMambaConfig, "UNetShape": config.UNetConfig}
    return {
        **{
            f"{name.capitalize()}Flags": (getattr(flags, f"{name.capitalize()}Config"), ("given",)) for name in COMMANDS
        },
        "SegmentKeywords": (SegmentOptions, ()),
        **{name: (kind, ("in_chans", "out_chans")) for name, kind in networks.items()},
    }


def written(kind: Any, used: set[str]) -> str:
    """An annotation as a caller may give it: a path also as text, a tuple as any sequence."""
    if kind in ALIASES:
        used.add(ALIASES[kind])
        return ALIASES[kind]
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        parts = [part for each in arguments for part in written(each, used).split(" | ")]
        return " | ".join(dict.fromkeys(parts))
    if origin is Literal:
        choices = ", ".join(f'"{value}"' for value in arguments)
        return f"Literal[{choices}]"
    if origin is not None:
        return f"Sequence[{written(arguments[0], used)}]"
    return {Path: "StrPath", type(None): "None"}.get(kind, kind.__name__)


def stub() -> str:
    """The content of keywords.pyi."""
    used: set[str] = set()
    classes = []
    for name, (kind, without) in kinds().items():
        hints = get_type_hints(kind)
        lines = [f"class {name}(TypedDict, total=False):"]
        for field in dataclasses.fields(kind):
            if field.name in without:
                continue
            text = written(hints[field.name], used)
            text = "StrPath" if field.name == "use_pretrained" else text
            required = field.default is field.default_factory is dataclasses.MISSING
            lines.append(f"    {field.name}: {f'Required[{text}]' if required else text}")
        classes.append("\n".join(lines) + "\n")
    return HEAD.format(aliases="\n".join(f"    {name}," for name in sorted(used))) + "\n" + "\n".join(classes)


def test_the_stub_has_the_fields_of_the_dataclasses():
    assert STUB.read_text() == stub(), "run: python -m tests.typing.test_keywords"


@pytest.mark.parametrize("command", COMMANDS)
def test_completion_and_help_show_the_flags_of_a_command(command):
    kind = getattr(flags, f"{command.capitalize()}Config")
    names = {field.name for field in dataclasses.fields(kind)} - {"given"}
    signature = inspect.signature(getattr(mh, command))
    assert {*signature.parameters} - {"progress", "callbacks"} == names
    assert "tyro" not in str(signature)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sise": 2}, "batch_sise: there is no such keyword; did you mean batch_size?"),
        ({"batch_size": "2"}, "batch_size is '2'; expected int"),
        ({"batch_size": True}, "batch_size is True; expected int"),
        ({"batch_size": 2.0}, "batch_size is 2.0; expected int"),
        ({"resume": "False"}, "resume is 'False'; expected bool"),
        ({"model": "MambaHome"}, "model is 'MambaHome'; expected 'MambaHoME' or 'MambaHoME_small'"),
        ({"patch_size": (96, 96)}, r"patch_size is \(96, 96\); expected a sequence of 3 x int or None"),
        ({"mirror": "LR"}, "mirror is 'LR'; expected a sequence of 'none' or 'LR'"),
        ({"data_val": 3}, "data_val is 3; expected a path or None"),
        ({"lr": "1e-4"}, "lr is '1e-4'; expected float or None"),
        ({"output_dir": "s3://bucket/run"}, "a URL; expected a file or folder of this machine"),
    ],
)
def test_a_keyword_of_another_type_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        mh.train(data_train="prepared", **given)


def test_missing_keywords_are_named():
    with pytest.raises(ConfigError, match="data_path, model_path: required, but not given"):
        mh.infer()


def test_sequences_and_text_become_tuples_and_paths():
    keywords = {"data_path": "scans", "model_path": ["a", "b"], "roi_size": [16, 16, 16], "overlap": 0}
    config = from_keywords(flags.InferConfig, keywords)
    assert (config.data_path, config.model_path) == (Path("scans"), (Path("a"), Path("b")))
    assert (config.roi_size, config.overlap) == ((16, 16, 16), 0.0)


if __name__ == "__main__":
    STUB.write_text(stub())
