"""What a DICOM file is by its first elements, and whether all fit into it, before a library makes room for them.

Facts: DICOM PS3.5, sections 7.1 (explicit and implicit kinds), 7.5 (sequences and items), A.4 (packed pixels).
"""

import contextlib
import io
import re
import zlib
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

_TRANSFER = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
_IMPLICIT, _DEFLATED, _BIG = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"
# Kinds whose length has two bytes, and those that have four after two of padding.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US ??".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_KINDS = _SHORT | _LONG
_PIXELS, _MODALITY_LUT = (0x7FE0, 0x0010), (0x0028, 0x3000)
_SOP_CLASS, _SERIES, _NUMBER = (0x0008, 0x0016), (0x0020, 0x000E), (0x0020, 0x0011)
_ITEM, _ITEM_ENDS, _SEQUENCE_ENDS = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNKNOWN = 0xFFFFFFFF
# Deeper than any object of the standard nests its sequences.
_DEEPEST = 32
# Bytes in which the elements up to the series usually lie; where they do not, more are read, up to the most.
_HEADS = (1 << 13, 1 << 17, 1 << 24)
# A UID, and the number of a series.
_FORMS = (re.compile(rb"[0-9.]{1,64}"), re.compile(rb"[0-9]{1,12}"))
_Tag = tuple[int, int]


class _Damaged(Exception):
    pass


class _Element(NamedTuple):
    tag: tuple[int, int]
    kind: bytes | None  # None where it is implicit
    length: int


class Identity(NamedTuple):
    """What a DICOM file says it is; empty where it does not. number: of the series, digits only."""

    sop_class: str
    series: str
    number: str


def is_dicom(path: Path, head: bytes) -> bool:
    """Whether a file is DICOM: marked as such, or by its elements. head: its first 132 bytes or more.

    Raises OSError.
    """
    if head[128:132] == b"DICM":
        return True
    # Unmarked it begins with group 2 or 8, in either order of bytes: that rules nearly all other files out.
    return head[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and identify(path) is not None


def identify(path: Path) -> Identity | None:
    """What a DICOM file says it is; None for a file that is none. Raises OSError: it cannot be read."""
    with path.open("rb") as file:
        for size in _HEADS:
            file.seek(0)
            head = file.read(size)
            marked = head[128:132] == b"DICM"
            values, last = _first_values(head)
            # Beyond the series' number, at the end, or of something else that happens to begin like DICOM.
            if last > _NUMBER or len(head) < size or not (marked or values[_SOP_CLASS]):
                break
    if not marked and not values[_SOP_CLASS]:
        return None
    return Identity(values[_SOP_CLASS], values[_SERIES], values[_NUMBER])


def _first_values(head: bytes) -> tuple[dict[_Tag, str], _Tag]:
    """Text of class, series and its number in the first bytes of a file, and the last element looked at."""
    values, last = {_SOP_CLASS: "", _SERIES: "", _NUMBER: ""}, (0, 0)
    syntax, marked = transfer_syntax(head[:1024]), head[128:132] == b"DICM"
    walk = _Walk(io.BytesIO(head), False, "big" if syntax == _BIG else "little")
    start = 132 if marked else 0
    with contextlib.suppress(_Damaged, zlib.error):
        while last <= _NUMBER:
            if head[start : start + 2] != b"\x02\0" and last[0] in (0, 2):
                # The end of the meta header, from which on the file is spelled as that says.
                if syntax == _DEFLATED:
                    head, start, syntax = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head[start:], 1 << 17), 0, b""
                    walk = _Walk(io.BytesIO(head), False, "little")
                walk.implicit = syntax == _IMPLICIT or head[start + 4 : start + 6] not in _KINDS
            walk.file.seek(start)
            element = walk.next(len(head))
            last = element.tag
            if last in values:
                text = head[walk.file.tell() : walk.file.tell() + element.length].strip(b" \0")
                values[last] = text.decode() if _FORMS[last == _NUMBER].fullmatch(text) else ""
            walk.skip(element, len(head), 0)
            start = walk.file.tell()
    return values, last


def transfer_syntax(head: bytes) -> bytes:
    """How a file is spelled, a UID of PS3.5 chapter 10, by its first kilobyte; empty where that does not say."""
    found = _TRANSFER.search(head)
    return found[1] if found else b""


class Outline(NamedTuple):
    """whole: no element, at any depth, claims more bytes than what it lies in has left. modality_lut: there is a table
    that gives each stored value its real one, instead of slope and intercept."""

    whole: bool
    modality_lut: bool


def fits(path: Path) -> bool:
    """Whether a file is whole as `outline` says. Raises OSError."""
    return outline(path).whole


def outline(path: Path) -> Outline:
    """What the elements of a file say up to its pixels; of a deflated file, which is not looked into, the best.

    Raises OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
        syntax = transfer_syntax(head)
        if syntax == _DEFLATED:
            return Outline(True, False)
        marked = head[128:132] == b"DICM"
        implicit = syntax == _IMPLICIT if marked else head[4:6] not in _KINDS
        walk = _Walk(file, implicit, "big" if syntax == _BIG else "little")
        file.seek(132 if marked else 0)
        try:
            walk.elements(size, 0)
        except _Damaged:
            return Outline(False, walk.modality_lut)
    return Outline(True, walk.modality_lut)


class _Walk:
    def __init__(self, file: BinaryIO, implicit: bool, order: Literal["little", "big"]):
        self.file, self.implicit, self.order, self.modality_lut = file, implicit, order, False

    def elements(self, end: int, depth: int) -> None:
        """Up to `end`, or to the mark that ends an item of unknown length."""
        if depth > _DEEPEST:
            raise _Damaged
        while self.file.tell() < end:
            element = self.next(end)
            if element.tag == _ITEM_ENDS and depth:
                return
            self.modality_lut |= element.tag == _MODALITY_LUT and not depth and element.length > 0
            if element.tag == _PIXELS and not depth:
                if element.length == _UNKNOWN:
                    self._items(end, depth, packed=True)
                return
            if element.kind == b"SQ" and element.length != _UNKNOWN:
                self._items(self.file.tell() + element.length, depth + 1, packed=False)
            else:
                self.skip(element, end, depth)

    def skip(self, element: _Element, end: int, depth: int) -> None:
        """Go on behind the value of an element, whose items are looked at where it does not say its length."""
        if element.length != _UNKNOWN:
            self.file.seek(element.length, 1)
            return
        # Of a kind that its writer did not know, it is an implicit sequence whatever the file.
        before, self.implicit = self.implicit, self.implicit or element.kind == b"UN"
        self._items(end, depth + 1, packed=False)
        self.implicit = before

    def _items(self, end: int, depth: int, packed: bool) -> None:
        while self.file.tell() < end:
            item = self.next(end)
            if item.tag == _SEQUENCE_ENDS:
                return
            if item.tag != _ITEM:
                raise _Damaged
            if packed:
                self.file.seek(item.length, 1)
            else:
                self.elements(end if item.length == _UNKNOWN else self.file.tell() + item.length, depth)

    def next(self, end: int) -> _Element:
        """The element that begins here, up to its value."""
        head = self.file.read(8)
        if len(head) < 8:
            raise _Damaged
        group = int.from_bytes(head[:2], "little")
        # The group of the meta header is explicit and little-endian in every file.
        order = "little" if group == 2 else self.order
        tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order))
        kind: bytes | None = head[4:6]
        if tag[0] == 0xFFFE or (self.implicit and group != 2):
            kind, length = None, int.from_bytes(head[4:], order)
        elif kind in _SHORT:
            length = int.from_bytes(head[6:], order)
        elif kind in _LONG:
            length = int.from_bytes(self.file.read(4), order)
        else:
            # Some devices write implicit elements into sequences of explicit files.
            kind, length = None, int.from_bytes(head[4:], order)
        if length != _UNKNOWN and self.file.tell() + length > end:
            raise _Damaged
        return _Element(tag, kind, length)
