"""What packs and unpacks gzip: zlib, and isal where it is installed."""

import zlib

import pytest

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

ENGINES = [
    pytest.param(zlib, id="zlib"),
    pytest.param(isal_zlib, id="isal", marks=pytest.mark.skipif(isal_zlib is None, reason="isal is not installed")),
]
