"""Unpacking gzip: several members, what may lie behind them, and every kind of damage."""

import gzip

import pytest

from mambahome_jax.imaging.unpack import unpacked


@pytest.mark.parametrize("behind", [b"", bytes(100), gzip.compress(b"more")], ids=["end", "zeros", "member"])
def test_a_member_that_is_longer_than_what_is_unpacked_at_a_time_may_be_followed(behind):
    size = (20 << 20) + 4
    content, found = unpacked(gzip.compress(bytes(20 << 20), 1) + behind, size)
    assert found == (size if behind[:2] == b"\x1f\x8b" else size - 4)
    assert content == bytes(20 << 20) + (b"more" if found == size else bytes(4))
