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


def crc32(content: Any, before: int = 0) -> int:
    """CRC-32 of a contiguous buffer behind bytes that have the CRC-32 `before`."""
    return engine.crc32(content, before)
