"""Deflate and CRC-32 by ISA-L where isal is installed, which takes a fraction of zlib's time; by zlib elsewhere."""

import importlib
import zlib
from typing import Any


def _installed() -> Any:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


engine: Any = _installed()


def deflated(content: Any, *, noise: bool) -> bytes:
    """Raw deflate blocks that end at a whole byte, so that they can stand behind others and others behind them.

    content: any contiguous buffer. noise: no repeats are to be expected in it, as in measured floats.
    """
    if engine is zlib:
        # Level 1 packs a noisy CT to within a few percent of level 6 at three times its speed. Noisy floats
        # have no repeats to find, only runs: the same size, at more than twice the speed again.
        strategy = zlib.Z_RLE if noise else zlib.Z_DEFAULT_STRATEGY
        packer: Any = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    else:
        # ISA-L has one strategy. Its level 3 packs no better at half the speed or less, and differs with the processor.
        packer = engine.compressobj(2, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush(zlib.Z_SYNC_FLUSH)


def crc32(content: Any, before: int = 0) -> int:
    """CRC-32 of a contiguous buffer behind bytes that have the CRC-32 `before`."""
    return engine.crc32(content, before)
