"""Seeded ways to damage a file: NIfTI field by field, other formats byte by byte and line by line."""

import gzip
import math
import random
import re
import struct
from collections.abc import Callable

import nibabel as nib
import numpy as np

AFFINE = np.array([[-2.0, 0, 0, 30], [0, -1, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
SHAPE = (12, 16, 8)

# Name, offset and struct format of fields of a NIfTI-1 header.
_FIELDS = (
    *(("sizeof_hdr", 0, "i"), ("dim_info", 39, "B"), ("intent_code", 68, "h"), ("datatype", 70, "h")),
    *(("bitpix", 72, "h"), ("slice_start", 74, "h"), ("vox_offset", 108, "f"), ("scl_slope", 112, "f")),
    *(("scl_inter", 116, "f"), ("slice_end", 120, "h"), ("slice_code", 122, "B"), ("xyzt_units", 123, "B")),
    *(("qform_code", 252, "h"), ("sform_code", 254, "h"), ("magic", 344, "i")),
    *((f"dim{n}", 40 + 2 * n, "h") for n in range(8)),
    *((f"pixdim{n}", 76 + 4 * n, "f") for n in range(8)),
    *((f"quatern{n}", 256 + 4 * n, "f") for n in range(6)),
    *((f"srow{n}", 280 + 4 * n, "f") for n in range(12)),
)
_FLOATS = (0.0, -1.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-38, 1e-45, 1e10, -1e10, 1e-6, 65536.0, 0.5)
_TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, 255, 9999)


def scan(kind: str, rng: np.random.Generator, label: bool = False) -> bytes:
    """A sound NIfTI file, not compressed; kind: int16, float32, big, nifti2 or 4d."""
    array = rng.integers(-1000, 1000, SHAPE).astype(np.int16)
    if label:
        array = np.zeros(SHAPE, np.uint8)
        array[2:6, 3:9, 2:5], array[7:10, 8:14, 4:7] = 1, 2
    elif kind == "float32":
        array = array.astype(np.float32)
    elif kind == "4d":
        array = np.stack([array, array], -1)
    if kind == "nifti2":
        return nib.Nifti2Image(array, AFFINE).to_bytes()
    image = nib.Nifti1Image(array, AFFINE, dtype=array.dtype)
    image.set_qform(AFFINE, 1)
    if kind == "big":
        return nib.Nifti1Image(array, AFFINE, header=image.header.as_byteswapped(">")).to_bytes()
    return image.to_bytes()


def nifti(seed: int, label: bool = False) -> tuple[str, str, bytes]:
    """Kind of damage, suffix and content of the mutated NIfTI file number `seed`; always the same for the same seed."""
    chance = random.Random(seed)
    content = scan(
        chance.choice(["int16", "int16", "float32", "big", "nifti2", "4d"]), np.random.default_rng(seed), label
    )
    packed = chance.random() < 0.6
    # In turn, so that each kind comes equally often.
    name, damage, after = _DAMAGES[seed % len(_DAMAGES)]
    if not after:
        content = damage(chance, content)
    if packed or after:
        content = gzip.compress(content, 1, mtime=0)
    if after:
        content = damage(chance, content)
    suffix = ".nii.gz" if packed or after else ".nii"
    if name == "wrong name":
        suffix = ".nii" if suffix == ".nii.gz" else ".nii.gz"
    return name, suffix, content


def flip(chance: random.Random, content: bytes, most: int = 8, first: int = 0, end: int | None = None) -> bytes:
    """Up to `most` bytes of content[first:end] replaced."""
    changed = bytearray(content)
    end = min(end or len(changed), len(changed))
    for _ in range(chance.randint(1, most)):
        if first < end:
            changed[chance.randrange(first, end)] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
    return bytes(changed)


def cut(chance: random.Random, content: bytes) -> bytes:
    """Without its end: nearly all of it, a few bytes, or anything between."""
    where = chance.choice(
        [0, 1, 100, 347, 348, 352, len(content) - 1, len(content) - 8, chance.randrange(len(content))]
    )
    return content[: max(where, 0)]


def text(chance: random.Random, content: bytes) -> bytes:
    """A text header (JSON, MetaImage, NRRD) with a number, a word or a line replaced."""
    head, tail = content[:2000], content[2000:]
    choice = chance.randrange(4)
    if choice == 0:
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", head))
        where = chance.choice(numbers) if numbers else None
        new = chance.choice(
            [b"0", b"-1", b"nan", b"inf", b"1e308", b"99999999999999999999", b"4000000000", b"x", b"65536"]
        )
        head = head if where is None else head[: where.start()] + new + head[where.end() :]
    elif choice == 1:
        words = list(re.finditer(rb"[A-Za-z_]+", head))
        where = chance.choice(words) if words else None
        new = chance.choice(
            [b"", b"null", b"True", b"[]", b"{}", b"LOCAL", b"MET_DOUBLE", b"raw", "\u00e4".encode(), b"\xff\xfe"]
        )
        head = head if where is None else head[: where.start()] + new + head[where.end() :]
    elif choice == 2:
        lines = head.split(b"\n")
        del lines[chance.randrange(len(lines))]
        head = b"\n".join(lines)
    else:
        lines = head.split(b"\n")
        lines.insert(chance.randrange(len(lines)), chance.choice(lines))
        head = b"\n".join(lines)
    return head + tail


def any_file(seed: int, content: bytes, textual: bool) -> tuple[str, bytes]:
    """Kind of damage and content of a mutated file of any format. textual: it has a header that people can read."""
    chance = random.Random(seed)
    kinds = ["flip", "flip head", "cut", "nonsense", *(["text", "text", "text"] if textual else [])]
    kind = kinds[seed % len(kinds)]
    if kind == "flip":
        return kind, flip(chance, content, 20)
    if kind == "flip head":
        return kind, flip(chance, content, 8, end=1024)
    if kind == "cut":
        return kind, cut(chance, content)
    if kind == "text":
        return kind, text(chance, content)
    return kind, _nonsense(chance, content)


def _order(content: bytes) -> str:
    return "<" if content[0] in (92, 28) else ">"


def _field(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        name, offset, form = chance.choice(_FIELDS)
        if form == "f":
            value: float = chance.choice(_FLOATS)
        elif name == "datatype":
            value = chance.choice(_TYPES)
        else:
            bits = 8 * struct.calcsize(form)
            low, high = (0, 2**bits - 1) if form == "B" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            value = chance.choice([0, 1, low, high, chance.randint(low, high), chance.randint(0, 8)])
        struct.pack_into(_order(content) + form, changed, offset, value)
    return bytes(changed)


def _floats(names: tuple[str, ...]) -> Callable[[random.Random, bytes], bytes]:
    """Damage that writes special numbers into fields whose names begin so; several at once."""
    offsets = [offset for name, offset, form in _FIELDS if form == "f" and name.startswith(names)]

    def damage(chance: random.Random, content: bytes) -> bytes:
        changed = bytearray(content)
        if chance.random() < 0.3:
            struct.pack_into(_order(content) + "h", changed, 254, 0)
        for offset in chance.sample(offsets, chance.randint(1, len(offsets))):
            struct.pack_into(_order(content) + "f", changed, offset, chance.choice(_FLOATS))
        return bytes(changed)

    return damage


def _terabytes(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    order = _order(content)
    axes = chance.randint(3, 7)
    if struct.unpack_from(order + "i", content)[0] == 540:
        sizes = [chance.choice([2**31, 2**40, 2**62, 100_000]) for _ in range(7)]
        struct.pack_into(order + "8q", changed, 16, axes, *sizes)
    else:
        struct.pack_into(order + "8h", changed, 40, axes, *[chance.choice([32767, 20000, 5000]) for _ in range(7)])
    return bytes(changed)


def _voxels(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 50)):
        where = 352 + 4 * chance.randrange((len(content) - 560) // 4)
        special = chance.choice([b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"])
        changed[where : where + 4] = special
    return bytes(changed)


def _slope(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    struct.pack_into(_order(content) + "2f", changed, 112, chance.choice(_FLOATS), chance.choice(_FLOATS))
    return bytes(changed)


def _bomb(chance: random.Random, content: bytes) -> bytes:
    """A member of 300 MB of zeros behind a sound file, or such a member alone with the header of a large scan."""
    zeros = gzip.compress(bytes(300 << 20), 1, mtime=0)
    return content + zeros if chance.random() < 0.5 else gzip.compress(gzip.decompress(content)[:352], 1) + zeros


def _members(chance: random.Random, content: bytes) -> bytes:
    plain = gzip.decompress(content)
    where = chance.randrange(len(plain))
    parts = [gzip.compress(plain[:where], 1), gzip.compress(plain[where:], 1)]
    return b"".join(parts) + chance.choice([b"", b"\0" * 100, b"garbage", parts[0]])


def _nonsense(chance: random.Random, content: bytes) -> bytes:
    return chance.choice(
        [
            b"",
            b"\0" * 1000,
            b"\x89PNG\r\n\x1a\n" + bytes(500),
            b"PK\3\4" + bytes(500),
            b"<html>not found</html>",
            content[::-1],
            chance.randbytes(2000),
            b"version https://git-lfs.github.com/spec/v1\n",
            b"\x1f\x8b",
            b"\\\1\0\0",
        ]
    )


# Name, function, whether it damages what gzip made.
_DAMAGES: tuple[tuple[str, Callable[[random.Random, bytes], bytes], bool], ...] = (
    ("header fields", _field, False),
    ("header bytes", lambda chance, content: flip(chance, content, 8, end=348), False),
    ("truncated", cut, False),
    ("truncated gzip", cut, True),
    ("gzip bytes", lambda chance, content: flip(chance, content, 4), True),
    ("gzip header", lambda chance, content: flip(chance, content, 2, end=12), True),
    ("gzip members", _members, True),
    ("affine", _floats(("srow", "quatern", "pixdim")), False),
    ("sizes", _terabytes, False),
    ("slope", _slope, False),
    ("voxels", _voxels, False),
    ("not NIfTI", _nonsense, False),
    ("wrong name", lambda chance, content: content, False),
    ("any bytes", lambda chance, content: flip(chance, content, 40), False),
    ("offset", _floats(("vox_offset",)), False),
    ("bomb", _bomb, True),
)
