"""What the command line says of its flags: help in groups, what is wrong with a value, and how a word goes on.

All of it comes from the dataclasses of flags.py and the strings below their fields.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

_FIRST, _ALL = "Most used flags", "Flags"
_WIDEST, _INDENT = 100, 26  # columns of help, and those before a flag's text
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_NOUNS = {int: "whole number", float: "number", str: "word", Path: "path"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command. item: type of one value; count: how many it takes, None for any number.

    argument: its name in capitals where it is typed without one. metavar: what stands for its values, if not their
    type. hint: of its default.
    """

    name: str
    item: Any
    count: int | None
    default: Any
    text: str
    argument: str = ""
    metavar: str = ""
    hint: str = ""

    @classmethod
    def of(cls, field: dataclasses.Field, text: str) -> "Flag":
        """Read a field of flags.py and the string below it."""
        from tyro.conf import Positional  # not for `mambahome --help`, which has no flags

        kind: Any = field.type
        marks = kind.__metadata__ if get_origin(kind) is Annotated else ()
        kind = kind.__origin__ if marks else kind
        said = {name: value for mark in marks for name, value in vars(mark).items() if isinstance(value, str)}
        if get_origin(kind) in (Union, types.UnionType):
            kinds = [each for each in get_args(kind) if each is not types.NoneType]
            kind = next((each for each in kinds if get_origin(each) is tuple), kinds[0])
        values = get_args(kind) if get_origin(kind) is tuple else (kind,)
        metavar, argument = said.get("metavar", ""), Positional in marks
        return cls(
            field.name,
            values[0],
            None if Ellipsis in values else len(values),
            field.default,
            said.get("help", text),
            metavar if argument else "",
            "" if argument else metavar,
            said.get("help_behavior_hint", ""),
        )

    @property
    def required(self) -> bool:
        """Whether the command cannot do without it."""
        return self.default is dataclasses.MISSING

    @property
    def bare(self) -> bool:
        """Whether its name alone says all."""
        return self.item is bool and self.default is False

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that one of it may have, where they are few."""
        if self.item is bool:
            return ("True", "False")
        return get_args(self.item) if get_origin(self.item) is Literal else ()

    def __str__(self) -> str:
        """Write the flag and what it takes as they are typed."""
        if self.argument or self.bare:
            return self.argument or f"--{self.name}"
        word = self.metavar or "|".join(self.choices) or _METAVARS[self.item]
        return f"--{self.name} " + (f"{word} ..." if self.count is None else " ".join([word] * self.count))

    def help(self) -> str:
        """Say what it does, and its default."""
        hint, default = self.hint, self.default
        if self.required:
            hint = "(required)"
        elif not hint and default not in (None, "", (), False) and "(default" not in self.text:
            hint = f"(default: {default})"
        return f"{self.text.rstrip('.')} {hint}." if hint else self.text

    def refuse(self, words: Sequence[str]) -> str:
        """Say that it does not take these values, which ones it does, and the nearest."""
        expected = " or ".join(filter(None, [", ".join(self.choices[:-1]), *self.choices[-1:]]))
        if not expected:
            noun = _NOUNS[self.item]
            expected = f"a {noun}" if self.count == 1 else f"{self.count or 'one or more'} {noun}s"
        found = " ".join(words) or "has no value"
        wrong = next((word for word in words if word not in self.choices), "")
        return f"--{self.name} {found}; expected {expected}. {nearest(wrong, self.choices)}".rstrip(". ")


def nearest(word: str, words: Iterable[str]) -> str:
    """Ask whether the most similar of some words was meant, or those that begin so; nothing where none is."""
    known = {each.lower(): each for each in words}
    longer = [each for each in known if each.startswith(f"{word.lower()}_")]
    found = longer or get_close_matches(word.lower(), known, 1)
    return f"Did you mean {' or '.join(known[each] for each in found)}? " if found else ""


@cache
def groups(config: type) -> Mapping[str, tuple[Flag, ...]]:
    """The flags of a command by heading. The class names each heading before its flags, as a ClassVar."""
    from tyro.conf import Suppress

    source = ast.parse(Path(inspect.getfile(config)).read_text(encoding="utf-8"))
    body = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == config.__name__).body
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
    fields, heading = {field.name: field for field in dataclasses.fields(config)}, _FIRST
    found: dict[str, list[Flag]] = {}
    for name, kind in config.__annotations__.items():
        if kind is ClassVar:
            heading = getattr(config, name)
        elif Suppress not in getattr(kind, "__metadata__", ()):
            found.setdefault(heading, []).append(Flag.of(fields[name], texts.get(name, "")))
    return {heading if len(found) > 1 else _ALL: tuple(group) for heading, group in found.items()}


def flags(config: type) -> dict[str, Flag]:
    """Every flag of a command by its name."""
    return {flag.name: flag for group in groups(config).values() for flag in group}


def help_text(config: type, prog: str, brief: bool) -> str:
    """Describe a command and its flags, in the width of the terminal; brief: those that matter first alone."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    first, *others = groups(config).items()
    typed = [str(flag) if flag.required else f"[{flag}]" for flag in first[1] if flag.required or flag.argument]
    usage = " ".join(["usage:", prog, *typed, "[flags]"])
    lines = textwrap.wrap(usage, width, subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", *textwrap.wrap(inspect.getdoc(config) or "", width)]
    for heading, group in [first] if brief else [first, *others]:
        lines += ["", f"{heading}:"]
        for flag in group:
            text = textwrap.wrap(flag.help(), width - _INDENT, break_on_hyphens=False) or [""]
            head = f"  {flag}"
            if len(head) + 2 > _INDENT:
                lines.append(head)
                head = ""
            lines += [f"{begin:<{_INDENT}}{line}" for begin, line in zip([head] + [""] * len(text), text, strict=False)]
    if brief and others:
        more = f"{sum(len(group) for _, group in others)} more flags"
        names = ", ".join(heading.lower() for heading, _ in others)
        lines += ["", *textwrap.wrap(f"{prog} --help has {more}: {names}.", width)]
    return "\n".join(lines)


def why_refused(config: type, words: Sequence[str], reads: Callable[[type, Sequence[str]], bool]) -> str:
    """Say what is wrong with the words of a command line; nothing where no flag alone is to blame.

    reads: whether a class of flags takes some words.
    """
    known, types_of = flags(config), {field.name: field.type for field in dataclasses.fields(config)}
    arguments = [flag for flag in known.values() if flag.argument]
    loose: list[str] = []  # behind no flag
    given: list[tuple[Flag, list[str]]] = []
    for word in words:
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and name in known:
            given.append((known[name], [value] if equals else []))
        elif not given or (arguments and len(given[-1][1]) == given[-1][0].count):
            loose.append(word)
        else:
            given[-1][1].append(word)
    for flag, values in given:
        alone = dataclasses.make_dataclass(flag.name, [(flag.name, types_of[flag.name])])
        if not reads(alone, [f"--{flag.name}", *values]):
            return flag.refuse(values)
    if wrong := next((word for word in loose if word.startswith("-")), ""):
        near = nearest(f"-{wrong}", (f"--{name}" for name in known))
        return f"{wrong}: no such flag. {near}--help lists all of them"
    named = [flag for flag, _ in given]
    missing = [flag for flag in known.values() if flag.required and not flag.argument and flag not in named]
    if loose and not arguments:
        meant = f". Did you mean --{missing[0].name} {loose[0]}?" if missing else ""
        return f"{loose[0]}: no flag stands before it{meant}"
    missing += [flag for flag in arguments[len(loose) :] if flag.required]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        return f"{' and '.join(map(str, missing))} {verb} missing; -h lists the most used flags"
    extra = [] if any(flag.count is None for flag in arguments) else loose[len(arguments) :]
    return f"{extra[0]}: one word too many; expected {' '.join(map(str, arguments))}" if extra else ""


def completions(commands: Mapping[str, type], words: Sequence[str]) -> list[str]:
    """What the last of these words may become: a command, a flag or one of its few values; nothing for a path.

    commands: the class of flags of each.
    """
    *before, last = words or [""]
    if not before:
        return [name for name in (*commands, "--help", "--version", "--completion") if name.startswith(last)]
    if before[0] not in commands:
        return []
    known = flags(commands[before[0]])
    flag = known.get(next((word[2:] for word in reversed(before) if word.startswith("--")), ""))
    values: Sequence[str] = ()
    if flag is None:
        more = not any(each.argument for each in known.values())
    else:
        begun = before[-1] != f"--{flag.name}"
        open_ended = flag.count is None or not begun
        values = flag.choices if open_ended else ()
        more = flag.bare or (begun and not (open_ended and flag.item is Path))
    names = [f"--{name}" for name in (*known, "help")] if last.startswith("-") or (more and not last) else []
    return [word for word in (*values, *names) if word.startswith(last)]


# Each asks the program itself, which so answers as of its version; a shell completes paths where that says nothing.
COMPLETION = {
    "bash": """_mambahome() {
    local IFS=$'\\n'
    COMPREPLY=($(mambahome --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o bashdefault -F _mambahome mambahome
""",
    "zsh": """#compdef mambahome
_mambahome() {
    local -a found
    found=(${(f)"$(mambahome --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
if [[ $funcstack[1] == _mambahome ]]; then _mambahome "$@"; else compdef _mambahome mambahome; fi
""",
    "fish": """function __mambahome
    set -l words (commandline -opc)
    mambahome --complete $words[2..] (commandline -ct) 2>/dev/null
end
complete -c mambahome -f -n 'count (__mambahome) >/dev/null' -a '(__mambahome)'
complete -c mambahome -F -n 'not count (__mambahome) >/dev/null'
""",
}
