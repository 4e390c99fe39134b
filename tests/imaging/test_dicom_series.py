"""Which DICOM series a folder holds, whatever its files are called and however they are spelled."""

import struct

import numpy as np
import pytest

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging import dicom
from mambahome_jax.imaging.dicom import holds_slices, is_scan, sort_out
from mambahome_jax.imaging.formats import content_of, identify
from mambahome_jax.imaging.volume import read_volume
from tests.imaging.dicom_files import CT, RTSTRUCT, element, write_slice

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 4, 3)).astype(np.int16)


def series(folder, uid="1.2.3.4", name="IM{}", add=0, **options):
    for k in range(3):
        write_slice(folder / name.format(k), VOXELS[:, :, k].T + add, (0, 0, 2.5 * k), series=uid, number=k, **options)
    return folder


def without_preamble(path):
    """The elements alone, as some archives and old devices write them."""
    content = path.read_bytes()
    meta = struct.unpack("<I", content[140:144])[0]
    path.write_bytes(content[144 + meta :])


@pytest.mark.parametrize(
    "name", ["IM{}", "{}", "1.2.840.113619.{}", "slice.00{}", "_{}", "x{}.dcm", "image{}.bin", "I{}.img", "I{}.raw"]
)
@pytest.mark.parametrize("preamble", [True, False])
def test_slices_are_known_by_their_content(tmp_path, name, preamble):
    series(tmp_path, name=name)
    for path in () if preamble else list(tmp_path.iterdir()):
        without_preamble(path)
    assert holds_slices(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path).array, VOXELS)


def test_the_series_of_a_file_is_not_one_that_it_refers_to(tmp_path):
    path = write_slice(tmp_path / "a", VOXELS[:, :, 0].T)
    content = path.read_bytes()
    start = 144 + struct.unpack("<I", content[140:144])[0]
    item = element(0x20, 0xE, "UI", "9.9.9")
    tail = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    unknown = struct.pack("<I", 0xFFFFFFFF)
    item = struct.pack("<HH", 0xFFFE, 0xE000) + unknown + item + tail
    sequence = struct.pack("<HH2sH", 8, 0x1115, b"SQ", 0) + unknown + item
    place = content.index(struct.pack("<HH", 0x10, 0x10), start)
    path.write_bytes(content[:place] + sequence + content[place:])
    assert identify(path) == (CT, "1.2.3.4", "7")
    # Private elements of any length before it.
    private = element(9, 0x1010, "OB", bytes(200_000))
    path.write_bytes(content[:place] + private + content[place:])
    assert identify(path) == (CT, "1.2.3.4", "7")
    assert read_volume(tmp_path).shape == (5, 4, 1)


@pytest.mark.parametrize("content", [b"", b"\x08\0", bytes(400), b"\x08\0\x16\0UI\2\0xy", b"text of a note" * 40])
def test_other_files_are_no_dicom(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert identify(tmp_path / "a") is None and content_of(tmp_path / "a") == ""
    assert not holds_slices(tmp_path)


def test_a_series_of_several_is_chosen_by_its_uid(tmp_path):
    series(series(tmp_path), "1.2.5", "B{}", add=7)
    write_slice(tmp_path / "RS", VOXELS[:, :, 0], sop_class=RTSTRUCT, series="1.2.9")
    contents = sort_out(sorted(tmp_path.iterdir()))
    assert [(one.uid, one.number, len(one.paths)) for one in contents.series] == [
        ("1.2.5", "7", 3),
        ("1.2.3.4", "7", 3),
    ]
    assert [path.name for path in contents.non_images] == ["RS"]
    np.testing.assert_array_equal(dicom.read(tmp_path, ("1.2.5",))[0], VOXELS + 7)
    np.testing.assert_array_equal(dicom.read(tmp_path, ("1.2.3.4", "1.2.77"))[0], VOXELS)
    for asked, message in (
        ((), r"(?s)2 series:\n  - UID 1\.2\.5: 3 .*--series UID"),
        (("1.2.6",), r"2 series, none of them 1\.2\.6"),
        (("1.2.5", "1.2.3.4"), "2 series:"),
    ):
        with pytest.raises(DatasetError, match=message):
            dicom.read(tmp_path, asked)


def test_a_damaged_file_belongs_to_the_only_series(tmp_path):
    series(tmp_path)
    (tmp_path / "A.dcm").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"A\.dcm: truncated or damaged"):
        read_volume(tmp_path)
    series(tmp_path, "1.2.5", "B{}")
    assert {one.uid: len(one.paths) for one in sort_out(sorted(tmp_path.iterdir())).series} == {
        **{"": 1, "1.2.5": 3, "1.2.3.4": 3}
    }


def test_slices_may_lie_in_folders_below(tmp_path):
    series(tmp_path / "p/study/one")
    np.testing.assert_array_equal(read_volume(tmp_path / "p").array, VOXELS)
    series(tmp_path / "p/study/two", "1.2.5", add=7)
    np.testing.assert_array_equal(dicom.read(tmp_path / "p", ["1.2.5"])[0], VOXELS + 7)
    # Beside a scan file they are a scan of their own, which is not what the folder is.
    (tmp_path / "p/study/a.nii.gz").touch()
    assert not is_scan(tmp_path / "p") and is_scan(tmp_path / "p/study/two")


@pytest.mark.parametrize(
    "sop_class", ["1.3.12.2.1107.5.9.1", "1.3.46.670589.11.0.0.12.2", "1.2.840.10008.5.1.4.1.1.67"]
)
def test_what_devices_and_programs_put_beside_slices_is_no_series(tmp_path, sop_class):
    series(tmp_path / "p1")
    path = write_slice(tmp_path / "p1/XX_0001", VOXELS[:, :, 0].T, series="1.2.9", sop_class=CT)
    size = bytes([len(sop_class) + len(sop_class) % 2, 0])
    before, after = (f"\x08\0\x16\0UI{part}".encode("latin") for part in ("\x1a\0" + CT + "\0", size.decode("latin")))
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after + sop_class.encode().ljust(size[0], b"\0")))
    contents = sort_out(sorted((tmp_path / "p1").iterdir()))
    assert contents.non_images == (path,) and [one.uid for one in contents.series] == ["1.2.3.4"]
