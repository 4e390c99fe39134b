"""Headers at which ITK ends its process or would read what lies elsewhere: a command goes on with the next file."""

import os
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.volume import read_volume
from mambahome_jax.preprocessing.examine import check
from mambahome_jax.support.processes import isolated_reads
from tests.imaging.dicom_files import write_slice

ARRAY = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
META = {
    "NDims = 3": ["NDims = -1", "NDims = 1000", "NDims = 3\nNDims = 1000", "NDims : 1000"],
    "ElementDataFile = LOCAL": [
        "ElementDataFile = a%s%n%n%n.raw 1 4 1",
        "ElementDataFile = a%03d.raw 1 4 0",
        "ElementDataFile = a%d%999999999d.raw 1 4 1",
        "ElementDataFile = LIST\npipe\npipe\npipe\npipe",
        "ElementDataFile = pipe",
        "ElementDataFile = /etc/passwd",
        "ElementDataFile = ../elsewhere.raw",
    ],
}
NRRD = ["a%999999d.raw 1 4 1", "q" * 100_000, "pipe", "../elsewhere.raw", "/etc/passwd", "LIST\npipe\npipe\npipe\npipe"]


@pytest.fixture
def folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "elsewhere.raw").write_bytes(ARRAY.tobytes())
    folder = tmp_path / "scans"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    return folder


def answers(paths) -> list[str]:
    found = []
    with isolated_reads():
        for path in paths:
            try:
                read_volume(path)
                found.append("read")
            except DatasetError as error:
                found.append(str(error))
    return found


def test_headers_that_would_end_the_process_or_lead_elsewhere_are_refused_by_name(folder):
    paths = [folder / "whole.mha", folder / "whole.nrrd"]
    for path in paths:
        sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(path))
    whole_meta, whole_nrrd = (path.read_bytes() for path in paths)
    for old, news in META.items():
        for new in news:
            paths.append(folder / f"{len(paths)}.mha")
            paths[-1].write_bytes(whole_meta.replace(old.encode(), new.encode(), 1))
            assert paths[-1].read_bytes() != whole_meta
    header = whole_nrrd.partition(b"\n\n")[0]
    for new in NRRD:
        paths.append(folder / f"{len(paths)}.nrrd")
        paths[-1].write_bytes(header + b"\ndata file: " + new.encode() + b"\n\n")
    for field in (b"sizes: ", b"space: ", b"labels: ", b"bogus: ", b"space: :="):
        paths.append(folder / f"{len(paths)}.nrrd")
        paths[-1].write_bytes(header + b"\n" + field + b"A" * 4000 + b"\n\n")
    paths.append(folder / f"{len(paths)}.nrrd")
    paths[-1].write_bytes(whole_nrrd.replace(b"type: short", b"type: " + b"A" * 490, 1))
    found = answers(paths)
    assert found[:2] == ["read", "read"]
    for path, answer in zip(paths[2:], found[2:], strict=True):
        assert answer.startswith(f"{path}: ") and len(answer) < 400


def test_a_long_header_and_a_file_of_voxels_beside_it_are_read(folder):
    image = sitk.GetImageFromArray(ARRAY)
    image.SetMetaData("segments", "x" * 70_000)
    path = folder / "a.nrrd"
    sitk.WriteImage(image, str(path))
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    (folder / "a.raw").write_bytes(voxels)
    path.write_bytes(head + b"\ndata file: a.raw\n\n")
    assert answers([path]) == ["read"]


def test_a_crash_of_a_library_is_one_case_of_check(tmp_path):
    image = sitk.GetImageFromArray(np.tile(ARRAY, (2, 2, 2)))
    for name in ("a", "b"):
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    (tmp_path / "b.mha").write_bytes((tmp_path / "b.mha").read_bytes().replace(b"NDims = 3", b"NDims = 1000", 1))
    path = write_slice(tmp_path / "c" / "0.dcm", np.zeros((40, 50), np.int16))
    content = path.read_bytes()
    start = 144 + struct.unpack("<I", content[140:144])[0]
    unknown = struct.pack("<I", 0xFFFFFFFF)
    nested = struct.pack("<HH2sH", 8, 0x1140, b"SQ", 0) + unknown + struct.pack("<HH", 0xFFFE, 0xE000) + unknown
    path.write_bytes(content[:start] + nested * 200_000 + content[start:])
    checked = check(folder=(tmp_path,), num_workers=1)
    errors = {finding.case: finding.found for finding in checked.findings if finding.severity == "error"}
    assert set(errors) == {"b", "c"} and checked.exit_code == 1 and checked.usable == 1
    assert all("the library that reads it ended its process" in found for found in errors.values())
