"""Whether the elements of a DICOM file fit into it, before a library makes room for what they claim.

Facts: DICOM PS3.5, sections 7.1 (explicit and implicit kinds), 7.5 (sequences and items), A.4 (packed pixels).
"""

import re
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

_TRANSFER = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
_IMPLICIT, _DEFLATED, _BIG = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"
# Kinds whose length has two bytes, and those that have four after two of padding.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US ??".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_PIXELS = (0x7FE0, 0x0010)
_ITEM, _ITEM_ENDS, _SEQUENCE_ENDS = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNKNOWN = 0xFFFFFFFF
# Deeper than any object of the standard nests its sequences.
_DEEPEST = 32


class _Damaged(Exception):
    pass


class _Element(NamedTuple):
    tag: tuple[int, int]
    kind: bytes | None  # None where it is implicit
    length: int


def transfer_syntax(head: bytes) -> bytes:
    """How a file is spelled, a UID of PS3.5 chapter 10, by its first kilobyte; empty where that does not say."""
    found = _TRANSFER.search(head)
    return found[1] if found else b""


def fits(path: Path) -> bool:
    """False where an element, at any depth, claims more bytes than what it lies in has left.

    True as well for what is not looked into: deflated files, and what stands behind the pixels.
    Raises OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
        syntax = transfer_syntax(head)
        if syntax == _DEFLATED:
            return True
        marked = head[128:132] == b"DICM"
        implicit = syntax == _IMPLICIT if marked else head[4:6] not in _SHORT | _LONG
        walk = _Walk(file, implicit, "big" if syntax == _BIG else "little")
        file.seek(132 if marked else 0)
        try:
            walk.elements(size, 0)
        except _Damaged:
            return False
    return True


class _Walk:
    def __init__(self, file: BinaryIO, implicit: bool, order: Literal["little", "big"]):
        self.file, self.implicit, self.order = file, implicit, order

    def elements(self, end: int, depth: int) -> None:
        """Up to `end`, or to the mark that ends an item of unknown length."""
        if depth > _DEEPEST:
            raise _Damaged
        while self.file.tell() < end:
            element = self._next(end)
            if element.tag == _ITEM_ENDS and depth:
                return
            if element.tag == _PIXELS and not depth:
                if element.length == _UNKNOWN:
                    self._items(end, depth, packed=True)
                return
            if element.length == _UNKNOWN:
                # Of a kind that its writer did not know, it is an implicit sequence whatever the file.
                before, self.implicit = self.implicit, self.implicit or element.kind == b"UN"
                self._items(end, depth + 1, packed=False)
                self.implicit = before
            elif element.kind == b"SQ":
                self._items(self.file.tell() + element.length, depth + 1, packed=False)
            else:
                self.file.seek(element.length, 1)

    def _items(self, end: int, depth: int, packed: bool) -> None:
        while self.file.tell() < end:
            item = self._next(end)
            if item.tag == _SEQUENCE_ENDS:
                return
            if item.tag != _ITEM:
                raise _Damaged
            if packed:
                self.file.seek(item.length, 1)
            else:
                self.elements(end if item.length == _UNKNOWN else self.file.tell() + item.length, depth)

    def _next(self, end: int) -> _Element:
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
