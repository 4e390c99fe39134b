"""Unpacking gzip with either engine: members, what lies between them, and every kind of damage, compared with zlib."""

import gzip
import io
import struct
import types
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambahome_jax.imaging import nifti
from mambahome_jax.imaging.nifti import DamagedError, unpacked, unpacked_head

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

ENGINES = [
    pytest.param(zlib, id="zlib"),
    pytest.param(isal_zlib, id="isal", marks=pytest.mark.skipif(isal_zlib is None, reason="isal is not installed")),
]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setattr(nifti, "deflate", request.param)
    return request.param


def reference(packed: bytes) -> bytes:
    """What zlib finds when it is given everything at once. Raises EOFError, zlib.error."""
    content = b""
    while True:
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        content += unpacker.decompress(packed)
        if not unpacker.eof:
            raise EOFError
        packed = unpacker.unused_data.lstrip(b"\0")
        if not packed:
            return content


def found_in(packed: bytes, size: int, step: int) -> bytes | None:
    """None where it is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti, "_STEP", step)
        patch.setattr(nifti, "_HEAD_STEP", step)
        try:
            content, found = unpacked(io.BytesIO(packed), size)
        except (EOFError, DamagedError):
            return None
        assert unpacked_head(io.BytesIO(packed), 20)[:found] == content[: min(found, 20)]
    assert len(content) == size and not any(content[found:])
    return bytes(content[:found])


def expected_of(packed: bytes) -> bytes | None:
    try:
        return reference(packed)
    except (EOFError, zlib.error):
        return None


CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda part, count: part * count, st.binary(min_size=1, max_size=9), st.integers(0, 20000)),
    st.builds(lambda size: bytes(size), st.integers(0, 1 << 18)),
)


@st.composite
def members(draw) -> bytes:
    content = draw(CONTENTS)
    flags = draw(st.integers(0, 31))
    head = b"\x1f\x8b\x08" + bytes([flags]) + draw(st.binary(min_size=6, max_size=6))
    if flags & 4:
        extra = draw(st.binary(max_size=400))
        head += struct.pack("<H", len(extra)) + extra
    for flag in (8, 16):
        if flags & flag:
            head += draw(st.binary(max_size=40)).replace(b"\0", b"") + b"\0"
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    level, strategy = draw(st.integers(0, 9)), draw(st.sampled_from([0, zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED]))
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    half = len(content) // 2
    body = packer.compress(content[:half]) + packer.flush(draw(st.sampled_from([zlib.Z_SYNC_FLUSH, zlib.Z_NO_FLUSH])))
    body += packer.compress(content[half:]) + packer.flush()
    return head + body + struct.pack("<II", zlib.crc32(content), len(content))


FILES = st.lists(st.tuples(members(), st.sampled_from([0, 1, 700])), min_size=1, max_size=3).map(
    lambda parts: b"".join(member + bytes(zeros) for member, zeros in parts)
)
STEPS = st.sampled_from([4, 5, 64, 1000, 1 << 20])


@settings(max_examples=150)
@given(packed=FILES, step=STEPS, beyond=st.sampled_from([-1, 0, 5]))
@pytest.mark.parametrize("module", ENGINES)
def test_whole_files_are_read_however_they_are_cut(module, packed, step, beyond):
    content = reference(packed)
    step = max(step, len(content) // 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti, "deflate", module)
        size = max(len(content) + beyond, 0)
        assert found_in(packed, size, step) == content[:size]


def _changed(packed: bytes, kind: str, where: float, value: int) -> bytes:
    """`where`: 0 to 1; half of them lie within 12 bytes of an end, where headers and checksums are."""
    ends = min(12, len(packed))
    if where < 0.25:
        k = int(where * 4 * ends)
    elif where < 0.5:
        k = len(packed) - ends + int((where - 0.25) * 4 * ends)
    else:
        k = int((where - 0.5) * 2 * len(packed))
    k = min(k, len(packed) - 1)
    return {
        "byte": packed[:k] + bytes([value]) + packed[k + 1 :],
        "bit": packed[:k] + bytes([packed[k] ^ 1 << value % 8]) + packed[k + 1 :],
        "cut": packed[:k],
        "left out": packed[:k] + packed[k + 1 + value % 4 :],
        "put in": packed[:k] + bytes([value]) * (1 + value % 3) + packed[k:],
        "behind": packed + bytes([value]) * (1 + int(20 * where)),
        "twice": packed[:k] + packed,
    }[kind]


KINDS = st.sampled_from(["byte", "bit", "cut", "left out", "put in", "behind", "twice"])


@settings(max_examples=300)
@given(packed=FILES, kind=KINDS, where=st.floats(0, 1), value=st.integers(0, 255), step=STEPS)
@pytest.mark.parametrize("module", ENGINES)
def test_what_zlib_refuses_is_refused_and_nothing_else(module, packed, kind, where, value, step):
    damaged = _changed(packed, kind, where, value)
    expected = expected_of(damaged)
    step = max(step, len(packed) // 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti, "deflate", module)
        size = len(expected) if expected is not None else 1 << 20
        found = found_in(damaged, size, step)
    # ISA-L takes codes that leave some bits without a meaning; the checksum then still vouches for every voxel.
    if found != expected:
        assert module is not zlib and expected is None and found == reference(packed)


@pytest.mark.parametrize("behind", [b"", bytes(100), gzip.compress(b"more")], ids=["end", "zeros", "member"])
def test_a_member_that_is_longer_than_what_is_unpacked_at_a_time_may_be_followed(engine, behind):
    size = (20 << 20) + 4
    content, found = unpacked(io.BytesIO(gzip.compress(bytes(20 << 20), 1) + behind), size)
    assert found == (size if behind[:2] == b"\x1f\x8b" else size - 4)
    assert content == bytes(20 << 20) + (b"more" if found == size else bytes(4))


WHOLE = gzip.compress(bytes(range(256)) * 40)


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        (WHOLE[:-1], EOFError, "ended before"),
        (WHOLE[:100], EOFError, "ended before"),
        (WHOLE[:5], EOFError, "ended before"),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"a name without end", EOFError, "ended before"),
        (WHOLE[:-8] + bytes(4) + WHOLE[-4:], DamagedError, "wrong checksum"),
        (WHOLE[:-4] + bytes(4), DamagedError, "wrong checksum"),
        (WHOLE[:10] + b"\xff" + WHOLE[11:], DamagedError, "invalid packed bytes"),
        (WHOLE[:2] + b"\x07" + WHOLE[3:], DamagedError, "invalid packed bytes"),
        (WHOLE[:3] + b"\x02" + WHOLE[4:10] + bytes(2) + WHOLE[10:], DamagedError, "wrong checksum"),
        (gzip.compress(bytes(10000)) + b"\0\0more", DamagedError, "goes on behind its end"),
        (WHOLE + gzip.compress(bytes(1 << 27)), DamagedError, "more than .* bytes in it, 10240 expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_damage_has_the_same_words_with_either_engine(engine, packed, error, message):
    with pytest.raises(error, match=message):
        unpacked(io.BytesIO(packed), 10240)


@pytest.mark.parametrize("behind", [b"EXTRA", b"\0\0more", b"\x1e", b"-" * 100000], ids=lambda behind: str(len(behind)))
def test_bytes_behind_a_whole_file_are_left_alone(engine, behind):
    assert unpacked(io.BytesIO(WHOLE + behind), 10240) == (bytes(range(256)) * 40, 10240)
    assert unpacked(io.BytesIO(WHOLE + behind), 10000)[1] == 10000
    with pytest.raises(DamagedError, match="goes on behind its end"):
        unpacked(io.BytesIO(WHOLE + behind), 10241)


def test_an_unpacker_that_stands_still_is_left(monkeypatch):
    still = types.SimpleNamespace(eof=False, unconsumed_tail=b"", unused_data=b"")

    def decompress(packed, _):
        still.unconsumed_tail = packed
        return b""

    still.decompress = decompress
    engine = types.SimpleNamespace(decompressobj=lambda _: still, error=zlib.error, crc32=zlib.crc32)
    monkeypatch.setattr(nifti, "deflate", engine)
    with pytest.raises(EOFError):
        unpacked(io.BytesIO(WHOLE), 10240)


def test_only_the_start_of_a_file_is_read_for_its_header(engine):
    file = io.BytesIO(gzip.compress(bytes(1 << 24), 1))
    assert unpacked_head(file, 544) == bytes(544)
    assert file.tell() < 4096
