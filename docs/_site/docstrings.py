"""Docstrings as reStructuredText: names between backticks become code, a star is a star, fields have a line each."""

import dataclasses
import re
from typing import Any

_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.S)


def to_rst(text: str) -> str:
    """Rewrite what stands between backticks, and escape what would be markup elsewhere."""
    parts = _CODE.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            parts[number] = re.sub(r"[*|]", r"\\\g<0>", part)
            continue
        if not part.startswith("``"):
            parts[number] = f"`{part}`"
        if re.match(r"\w", parts[number + 1]):
            parts[number + 1] = "\\ " + parts[number + 1]
    return "".join(parts)


def with_fields(text: str, fields: set[str]) -> str:
    """Begin a paragraph at each line such as `name, other: what they are` of a dataclass."""

    def paragraph(match: re.Match) -> str:
        known = set(match["names"].split(", ")) <= fields
        return f"\n**{match['names']}**: " if known else match[0]

    return re.sub(r"^(?P<names>\w+(?:, \w+)*): ", paragraph, text, flags=re.M)


def _process(app, what: str, name: str, obj: Any, options, lines: list[str]) -> None:
    text = to_rst("\n".join(lines))
    if dataclasses.is_dataclass(obj):
        text = with_fields(text, {field.name for field in dataclasses.fields(obj)})
    # Napoleon takes what stands before a colon in the first line of a property for its type.
    lines[:] = ["", *text.split("\n")] if what in ("property", "attribute") else text.split("\n")


def setup(app):
    """Rewrite docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
