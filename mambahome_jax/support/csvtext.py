"""Names that anybody may have given, as cells of a CSV file that a spreadsheet may open.

A cell that begins with one of `_FORMULA` would be computed there, and may send what stands in the others elsewhere. An
apostrophe before it makes it text. `read_name` takes that away again, so that names are the same on both sides.
"""

from mambahome_jax.support.paths import one_form

# The last four are = + - @ in full width, which spreadsheets set to Japanese take for the same.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_MARK = "'"


def csv_name(name: str) -> str:
    """A name as a cell: with an apostrophe before what a spreadsheet would compute, in quotes where it needs them.

    A semicolon needs them too, as it divides cells where numbers are written with a comma.
    """
    text = _MARK + name if name.startswith((*_FORMULA, _MARK)) else name
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',;"\t\r\n') else text


def read_name(cell: str) -> str:
    """The name of which `csv_name` made a cell, its quotes already removed by a reader of CSV; its letters composed."""
    return one_form(cell[1:] if cell.startswith(_MARK) and cell[1:].startswith((*_FORMULA, _MARK)) else cell)
