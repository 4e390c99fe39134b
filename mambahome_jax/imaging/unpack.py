"""Unpacking gzip to its end, where its checksum stands, without keeping more than was asked for."""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from mambahome_jax.imaging import deflate

GZIP_MAGIC = b"\x1f\x8b"
_STEP = 1 << 20  # bytes that are unpacked at a time
_HEAD_STEP = 1 << 13
# What may lie behind the bytes asked for, beside as many again: a file of some kilobytes can hold gigabytes of zeros.
_BEYOND = 1 << 26
# Bits of a gzip header's fourth byte: what else it has.
_CHECKSUM, _EXTRA, _NAME, _COMMENT, _RESERVED = 2, 4, 8, 16, 0xE0


class DamagedError(Exception):
    """Packed bytes that cannot be unpacked or do not agree with their checksum."""


class TrailingError(DamagedError):
    """Bytes that are no gzip behind the end of a whole one."""


class Packed:
    """What a file holds from where it stands on, in pieces of about `size` bytes."""

    def __init__(self, file: BinaryIO, size: int = _STEP // 4) -> None:
        self._file, self._size, self._rest = file, size, b""

    def piece(self) -> bytes:
        """The next bytes; none at the end."""
        piece, self._rest = self._rest or self._file.read(self._size), b""
        return piece

    @property
    def left(self) -> int:
        """Bytes that were read from the file and given back."""
        return len(self._rest)

    def give_back(self, rest: bytes) -> None:
        """Have the next piece begin with what was not used of the last one."""
        self._rest = rest

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises EOFError: fewer are left."""
        taken = self._some()
        while len(taken) < count:
            taken += self._some()
        self.give_back(taken[count:])
        return taken[:count]

    def take_text(self) -> Iterator[bytes]:
        """Pieces up to a zero and that, however far away it is. Raises EOFError: there is none."""
        while b"\0" not in (piece := self._some()):
            yield piece
        end = piece.index(b"\0") + 1
        self.give_back(piece[end:])
        yield piece[:end]

    def _some(self) -> bytes:
        if not (piece := self.piece()):
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        return piece


def unpacked(file: BinaryIO, size: int) -> tuple[bytearray, int]:
    """The first `size` bytes that a gzip file holds, and how many of them it has; zeros where it has fewer.

    Several members and zeros between and behind them are read as one, as gzip does, which also leaves alone what lies
    behind the end and is no gzip.
    Raises EOFError: no end. DamagedError: damaged, something else behind fewer than `size` bytes, or far more than
    `size`.
    """
    content, found = bytearray(size), 0
    try:
        for part in _members(file, _STEP):
            kept = min(len(part), max(size - found, 0))
            content[found : found + kept] = part if kept == len(part) else part[:kept]
            found += len(part)
            if found > 2 * size + _BEYOND:
                raise DamagedError(f"more than {found} bytes in it, {size} expected")
    except TrailingError:
        # The members before it are whole by their checksums.
        if found < size:
            raise
    return content, min(found, size)


def unpacked_head(file: BinaryIO, size: int) -> bytes:
    """The first `size` bytes that a gzip file holds, or all of fewer. Raises as `unpacked`, as far as it reads."""
    head = b""
    for part in _members(file, _HEAD_STEP):
        head += part
        if len(head) >= size:
            break
    return head[:size]


def inflated(packed: Packed, step: int = _STEP, wbits: int = -zlib.MAX_WBITS) -> Iterator[bytes]:
    """What one stream holds, at most `step` bytes at a time; what lies behind it is given back.

    wbits: its container, in zlib's numbers; gzip only where its header is in one piece (ISA-L refuses some that are
    not). Raises EOFError: no end. DamagedError: damaged, or a wrong checksum of the container.
    """
    unpacker = deflate.engine.decompressobj(wbits)
    while not unpacker.eof:
        piece = unpacker.unconsumed_tail or packed.piece()
        try:
            part = unpacker.decompress(piece, step)
        except deflate.engine.error as error:
            raise DamagedError("invalid packed bytes") from error
        # At the end of a file output may still come without input. Where neither moves, it never would.
        if not part and not unpacker.eof and len(unpacker.unconsumed_tail) == len(piece):
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        yield part
    packed.give_back(unpacker.unused_data)


def _members(file: BinaryIO, step: int) -> Iterator[bytes]:
    packed = Packed(file, step // 4)
    yield from _member(packed, step)
    while piece := packed.piece():
        packed.give_back(rest := piece.lstrip(b"\0"))
        if rest:
            if not GZIP_MAGIC.startswith(rest[:2]):
                raise TrailingError("it goes on behind its end")
            yield from _member(packed, step)


def _member(packed: Packed, step: int) -> Iterator[bytes]:
    _skip_header(packed)
    checksum = length = 0
    for part in inflated(packed, step):
        checksum, length = deflate.crc32(part, checksum), length + len(part)
        yield part
    if packed.take(8) != struct.pack("<II", checksum, length % (1 << 32)):
        raise DamagedError("wrong checksum or length")


def _skip_header(packed: Packed) -> None:
    start = packed.take(2)
    if start != GZIP_MAGIC:
        raise DamagedError("it goes on behind its end")
    start += packed.take(8)
    method, flags = start[2:4]
    if method != zlib.DEFLATED or flags & _RESERVED:
        raise DamagedError("unknown kind of gzip")
    checksum = deflate.crc32(start)
    if flags & _EXTRA:
        count = packed.take(2)
        checksum = deflate.crc32(count + packed.take(int.from_bytes(count, "little")), checksum)
    for flag in (_NAME, _COMMENT):
        if flags & flag:
            for part in packed.take_text():
                checksum = deflate.crc32(part, checksum)
    if flags & _CHECKSUM and int.from_bytes(packed.take(2), "little") != checksum % (1 << 16):
        raise DamagedError("wrong checksum of its header")
