"""What a DICOM file's elements claim, against what the file holds: such a file is read or refused, never half read."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.formats import identify
from mambahome_jax.imaging.volume import read_volume
from tests.imaging.dicom_files import CT, element, write_slice

UNKNOWN = 0xFFFFFFFF


def fits(path) -> bool:
    try:
        read_volume(path.parent)
    except DatasetError as error:
        assert f"{path}: truncated or damaged" in str(error)
        return False
    return True


def _item(content: bytes, known: bool = True) -> bytes:
    if known:
        return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
    return struct.pack("<HHI", 0xFFFE, 0xE000, UNKNOWN) + content + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)


def _sequence(items: bytes, known: bool = True, kind: bytes = b"SQ", number: int = 0x1140) -> bytes:
    head = struct.pack("<HH2sH", 8, number, kind, 0)
    if known:
        return head + struct.pack("<I", len(items)) + items
    return head + struct.pack("<I", UNKNOWN) + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def _file(tmp_path, elements: bytes, behind: bytes = b""):
    """A whole slice with `elements` before all others of the data set, and `behind` after them."""
    path = write_slice(tmp_path / "slice.dcm", np.zeros((4, 5), np.int16))
    whole = path.read_bytes()
    at = 132 + 12 + struct.unpack("<I", whole[140:144])[0]
    path.write_bytes(whole[:at] + elements + behind + whole[at:])
    return path


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "marks"])
def test_sequences_within_sequences_fit(tmp_path, known):
    inner = _sequence(_item(element(8, 0x1150, "UI", "1.2.3"), known), known)
    path = _file(tmp_path, _sequence(_item(inner + element(8, 0x1155, "UI", "1.2"), known) * 2, known))
    assert fits(path)


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "marks"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_element_that_claims_more_than_there_is_does_not_fit_at_any_depth(tmp_path, known, depth):
    claims = struct.pack("<HH2sHI", 8, 0x1160, b"OB", 0, 1 << 31)
    for _ in range(depth):
        claims = _sequence(_item(claims, known), known)
    assert not fits(_file(tmp_path, claims))


def test_an_item_ends_where_its_length_says(tmp_path):
    longer = struct.pack("<HH2sH", 8, 0x1150, b"UI", 40) + bytes(4)
    assert not fits(_file(tmp_path, _sequence(_item(longer))))


def test_implicit_elements_in_sequences_of_an_explicit_file(tmp_path):
    known = (CT, "1.2.3.4", "7")
    inner = struct.pack("<HHI", 8, 0x1150, 6) + b"1.2.3\0"
    assert identify(_file(tmp_path, _sequence(_item(inner)))) == known
    nested = (
        struct.pack("<HHI", 8, 0x1140, UNKNOWN) + _item(inner, known=False) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    )
    assert identify(_file(tmp_path, _sequence(_item(nested, known=False), known=False, kind=b"UN"))) == known
    claims = struct.pack("<HHI", 8, 0x1150, 1 << 30) + b"1.2.3\0"
    assert not fits(_file(tmp_path, _sequence(_item(claims, known=False), known=False, kind=b"UN")))


@pytest.mark.parametrize("rows", [5, 16, 0xFFFF])
def test_rows_beyond_the_pixels_are_not_filled_with_what_the_memory_holds(tmp_path, rows):
    path = _file(tmp_path, b"")
    whole = path.read_bytes()
    at = whole.rindex(struct.pack("<HH2s", 0x28, 0x10, b"US")) + 8
    path.write_bytes(whole[:at] + struct.pack("<H", rows) + whole[at + 2 :])
    assert not fits(path)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_truncated_slice_does_not_fit(tmp_path, cut):
    path = _file(tmp_path, b"")
    path.write_bytes(path.read_bytes()[:-cut])
    assert not fits(path)


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"])
def test_other_spellings_as_pydicom_writes_them(tmp_path, syntax):
    pydicom = pytest.importorskip("pydicom", reason="pydicom, which writes them, is not installed (extra [dicomseg])")
    data = pydicom.dcmread(_file(tmp_path, _sequence(_item(element(8, 0x1150, "UI", "1.2.3")))))
    uid = getattr(pydicom.uid, syntax)
    data.file_meta.TransferSyntaxUID = uid
    path = tmp_path / "slice.dcm"
    if uid.is_little_endian:
        pydicom.dcmwrite(path, data, implicit_vr=uid.is_implicit_VR, little_endian=True)
    else:
        data.PixelData = np.zeros((4, 5), ">i2").tobytes()
        pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=False, force_encoding=True)
    assert fits(path)
    if not syntax.startswith("Deflated"):
        path.write_bytes(path.read_bytes()[:-9])
        assert not fits(path)


@given(seed=st.integers(0, 2**32 - 1), bytes_changed=st.integers(1, 30))
def test_any_damage_is_answered_at_once(tmp_path_factory, seed, bytes_changed):
    inner = _sequence(_item(element(8, 0x1150, "UI", "1.2.3"), known=False), known=False)
    path = _file(tmp_path_factory.mktemp("damaged"), _sequence(_item(inner) * 3))
    rng = np.random.default_rng(seed)
    damaged = np.frombuffer(path.read_bytes(), np.uint8).copy()
    damaged[rng.integers(0, len(damaged), bytes_changed)] = rng.integers(0, 256, bytes_changed)
    path.write_bytes(damaged.tobytes())
    begun = time.process_time()
    identify(path)
    assert time.process_time() - begun < 1
