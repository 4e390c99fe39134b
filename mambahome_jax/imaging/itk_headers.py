"""Headers of MetaImage and NRRD files, looked at before ITK reads them: some end its process, or let it wait for ever.

A number of axes beyond what its tables hold, a name of a file of voxels that is longer than its buffers or a pattern
for printf, a pipe: none is an error to it. Both formats name their voxels' file, which is taken beside the header only.
"""

import re
from pathlib import Path

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import META_SUFFIXES, suffix_of
from mambahome_jax.support.files import head_of

# Tables of segments, as Slicer writes them, take some hundred kilobytes.
LONGEST = 1 << 22
# Of a line: what is longer overflows the buffers of NRRD's messages, but for the texts that they never hold.
_LONGEST_LINE = 500
_TEXT = re.compile(rb"#|content: |[^:\n]*:=")
AGAIN = "Copy or download it again, with the file of voxels that its header may name."
META_DATA = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*\n", re.MULTILINE)
_META_AXES = re.compile(rb"^[ \t]*NDims[ \t]*[=:][ \t]*([1-9]|10)[ \t\r]*\n", re.MULTILINE)
NRRD_END = re.compile(rb"\r?\n\r?\n")
_NRRD_DATA = re.compile(rb"^[ \t]*data[ \t]*file[ \t]*:(?!=)[ \t]*(.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)
_NRRD_AXES = re.compile(rb"^[ \t]*dimension[ \t]*:(?!=)[ \t]*(.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)


def require_harmless(path: Path) -> None:
    """Raises DatasetError: a header without an end, of another number of axes, or that names other than one plain file
    beside it."""
    head = head_of(path, LONGEST)
    if suffix_of(path.name, META_SUFFIXES):
        _require_harmless_meta(path, head)
    else:
        _require_harmless_nrrd(path, head)


def _require_harmless_meta(path: Path, head: bytes) -> None:
    data = META_DATA.search(head)
    header = head[: data.end()] if data else head
    # Counted, so that no line counts which ITK reads in another way than the expressions above.
    if data is None or header.count(b"ElementDataFile") != 1:
        raise _damaged(path, "a header without its one last line ElementDataFile")
    if len(_META_AXES.findall(header)) != 1 or header.count(b"NDims") != 1:
        raise _damaged(path, "a header without its one line NDims, of 1 to 10 axes")
    if data[1].upper() != b"LOCAL":
        _require_beside(path, data[1])


def _require_harmless_nrrd(path: Path, head: bytes) -> None:
    end = NRRD_END.search(head)
    if end is None and len(head) == LONGEST:
        raise _damaged(path, "a header without an empty line at its end")
    header = head[: end.start()] if end else head
    if not all(re.fullmatch(rb"[1-9]|10", axes) for axes in _NRRD_AXES.findall(header)):
        raise _damaged(path, "a dimension that is not 1 to 10")
    if any(len(line) > _LONGEST_LINE and not _TEXT.match(line) for line in header.split(b"\n")):
        raise _damaged(path, f"a line of more than {_LONGEST_LINE} bytes")
    for name in _NRRD_DATA.findall(header):
        _require_beside(path, name)


def _require_beside(path: Path, name: bytes) -> None:
    text = name.decode(errors="replace")
    if text[:4].upper() == "LIST" or "%" in text:
        action = "Write it anew as one file, for example with 3D Slicer or SimpleITK."
        raise DatasetError("voxels in several files", file=path, expected="one file of voxels", action=action)
    shown = repr(text if len(text) < 100 else f"{text[:100]}...")
    if text in ("", ".", "..") or set(text) & set("/\\\0"):
        raise DatasetError(f"its voxels are in {shown}", file=path, expected="the name of a file beside it")
    try:
        there = (path.parent / text).is_file()
    except OSError:
        there = False
    if not there:
        raise _damaged(path, f"no file {shown} beside it")


def _damaged(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"truncated or damaged ({reason})", file=path, action=AGAIN)
