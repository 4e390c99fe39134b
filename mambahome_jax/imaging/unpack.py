"""Unpacking gzip to its end, where its checksum stands, without keeping more than was asked for."""

import gzip
import zlib

GZIP_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 20
# What may lie behind the bytes asked for, beside as many again: a file of some kilobytes can hold gigabytes of zeros.
_BEYOND = 1 << 26


def unpacked(packed: bytes, size: int) -> tuple[bytearray, int]:
    """The first `size` bytes that a gzip file holds, and how many of them it has; zeros where it has fewer.

    Several members and zeros between and behind them are read as one, as gzip does.
    Raises EOFError: no end. zlib.error: damaged. gzip.BadGzipFile: something else behind it, or far more than `size`.
    """
    content, found, position = bytearray(size), 0, 0
    view, unpacker = memoryview(packed), zlib.decompressobj(16 + zlib.MAX_WBITS)
    while not unpacker.eof or position < len(packed):
        piece = view[position : position + _PIECE]
        if unpacker.eof:
            rest = bytes(piece).lstrip(b"\0")
            position += len(piece) - len(rest)
            if rest and not packed.startswith(GZIP_MAGIC, position):
                raise gzip.BadGzipFile("it goes on behind its end")
            if rest:
                unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
            continue
        part = unpacker.decompress(piece, 16 * _PIECE)
        # At its end zlib counts what follows among the unconsumed as well.
        position += len(piece) - len(unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail)
        if not part and not piece and not unpacker.eof:
            raise EOFError("Compressed file ended before the end-of-stream marker was reached")
        kept = min(len(part), max(size - found, 0))
        content[found : found + kept] = part if kept == len(part) else part[:kept]
        found += len(part)
        if found > 2 * size + _BEYOND:
            raise gzip.BadGzipFile(f"more than {found} bytes in it, {size} expected")
    return content, min(found, size)
