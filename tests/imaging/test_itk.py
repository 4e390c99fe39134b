"""MetaImage and NRRD: the same voxels at the same places as a NIfTI file of the scan, and every fault named."""

import gzip
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging import nifti
from mambahome_jax.imaging.volume import Volume, read_labels, read_volume, write_volume
from tests.imaging.test_unpack import ENGINES

ARRAY = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)
ROTATION = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
# Columns in RAS mm, anisotropic each.
GRIDS = {
    "ras": np.diag([0.7, 0.9, 3.1]),
    "lps": np.diag([-0.7, -0.9, 3.1]),
    "flipped": np.diag([0.7, -0.9, -3.1]),
    "permuted": np.diag([0.7, 0.9, -3.1])[[2, 0, 1]],
    "oblique": ROTATION @ np.diag([0.7, 0.9, 3.1]),
    "oblique_left_handed": ROTATION @ np.diag([0.7, -0.9, 3.1]),
}


def affine_of(grid: str) -> np.ndarray:
    return nib.affines.from_matvec(GRIDS[grid], [-30.25, 14.5, 99.125])


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_itk_writes_lies_where_nibabel_sees_its_nifti(tmp_path, grid, suffix):
    write_volume(tmp_path / "scan.nii.gz", Volume(ARRAY, affine_of(grid)))
    image = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    volume = read_volume(tmp_path / f"scan{suffix}")
    np.testing.assert_array_equal(volume.array, ARRAY)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.affine, nib.load(tmp_path / "scan.nii.gz").affine, atol=2e-5)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_we_write_lies_where_nibabel_sees_itks_nifti(tmp_path, grid, suffix):
    path = tmp_path / f"labels{suffix}"
    write_volume(path, Volume(ARRAY, affine_of(grid)), names={1: "liver"})
    image = sitk.ReadImage(str(path))
    assert image.GetMetaData("labels") == '{"1": "liver"}'
    sitk.WriteImage(image, str(tmp_path / "same.nii"))
    same = nib.load(tmp_path / "same.nii")
    np.testing.assert_array_equal(np.asarray(same.dataobj), ARRAY)
    np.testing.assert_allclose(same.affine, affine_of(grid), atol=2e-5)
    back = read_volume(path)
    np.testing.assert_array_equal(back.array, ARRAY)
    np.testing.assert_allclose(back.affine, affine_of(grid), rtol=0, atol=1e-13)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "same.nii"]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_types_channels_and_shear_survive(tmp_path, suffix, dtype):
    array = np.random.default_rng(0).integers(0, 250, (3, 4, 5, 2)).astype(dtype)
    affine = np.eye(4)
    affine[0, 1] = 0.25
    path = tmp_path / f"a{suffix}"
    write_volume(path, Volume(array, affine))
    back = read_volume(path, channels=2)
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-15)
    write_volume(path, Volume(array[..., 0], affine))
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).dtype == dtype
    np.testing.assert_array_equal(read_labels(path).array, array[..., 0])


def test_a_fourth_axis_is_the_channels(tmp_path):
    array = np.arange(120, dtype=np.float64).reshape(2, 3, 4, 5)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha").array, array.transpose())
    sitk.WriteImage(sitk.GetImageFromArray(array[:1], isVector=False), str(tmp_path / "a.mha"))
    assert read_volume(tmp_path / "a.mha").array.ndim == 3


def test_nrrd_in_ras(tmp_path):
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 5 6 7\n"
        "space directions: (0,0.5,0) (-0.7,0,0) (0,0,3)\nkinds: domain domain domain\nendian: little\n"
        "encoding: gzip\nspace origin: (1,2,3)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + gzip.compress(ARRAY.tobytes(order="F")))
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.array, ARRAY)
    expected = [[0, -0.7, 0, 1], [0.5, 0, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine, expected, atol=1e-12)


def test_same_volume_gives_same_bytes_and_nothing_of_the_scan_but_its_grid(tmp_path):
    image = sitk.GetImageFromArray(ARRAY)
    image.SetMetaData("PatientName", "Doe^Jane")
    for suffix in (".mha", ".nrrd"):
        sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
        assert b"Doe" in (tmp_path / f"scan{suffix}").read_bytes()
        volume = read_volume(tmp_path / f"scan{suffix}")
        for name in ("a", "b"):
            write_volume(tmp_path / f"{name}{suffix}", volume)
        written = (tmp_path / f"a{suffix}").read_bytes()
        assert written == (tmp_path / f"b{suffix}").read_bytes() and b"Doe" not in written


def cut(path, array, keep, **options):
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), **options)
    path.write_bytes(path.read_bytes()[:keep])
    return path


def two_axes(path):
    return cut(path, ARRAY[0], None), "2 axes"


def not_finite(path):
    return cut(path, np.full((3, 3, 3), np.nan, np.float32), None), "27 voxels are NaN or infinite"


def one_wrong_byte(path):
    content = bytearray(cut(path, ARRAY, None, useCompression=True).read_bytes())
    content[-30] ^= 0x55
    path.write_bytes(content)
    return path, "truncated or damaged"


def text(path):
    path.write_text("not a scan")
    return path, "truncated or damaged"


def truncated(path):
    return cut(path, ARRAY, -60), "truncated or damaged"


def truncated_zip(path):
    return cut(path, ARRAY, -60, useCompression=True), "truncated or damaged"


def absent(path):
    return path, "no such file"


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("make", [two_axes, not_finite, text, truncated, truncated_zip, one_wrong_byte, absent])
def test_bad_files_are_named_with_what_was_found(tmp_path, make, suffix, capfd):
    path, message = make(tmp_path / f"a{suffix}")
    with pytest.raises(DatasetError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"DimSize = 4 3 2", b"DimSize = 4 3 20"),
        (b"MET_SHORT", b"MET_FLOAT"),
        (b"CompressedDataSize = ", b"CompressedDataSize = 9"),
        # MetaIO then reads beyond the end, and gives whatever was in memory.
        (b"CompressedDataSize", b"CompressedSize"),
    ],
)
def test_metaimage_with_other_voxels_than_its_header_says(tmp_path, capfd, before, after, packed):
    path = cut(tmp_path / "a.mha", np.arange(24, dtype=np.int16).reshape(2, 3, 4), None, useCompression=packed)
    content = path.read_bytes()
    if before not in content:
        pytest.skip("not in a file without compression")
    path.write_bytes(content.replace(before, after))
    with pytest.raises(DatasetError, match=r"truncated or damaged .* bytes of (packed )?voxels"):
        read_volume(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("make", [truncated, truncated_zip, one_wrong_byte])
def test_metaimage_says_nothing_beside_the_error(tmp_path, capfd, make):
    with pytest.raises(DatasetError):
        read_volume(make(tmp_path / "a.mha")[0])
    assert capfd.readouterr().err == ""


def test_complex_numbers_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="voxels of type complex"):
        read_volume(cut(tmp_path / "a.nrrd", np.zeros((3, 3, 3), np.complex64), None))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd"])
def test_compressed_files_are_checked_to_their_end(tmp_path, monkeypatch, suffix, engine):
    monkeypatch.setattr(nifti, "deflate", engine)
    path = cut(tmp_path / f"a{suffix}", ARRAY, None, useCompression=True)
    np.testing.assert_array_equal(read_volume(path).array, ARRAY.transpose())
    data = tmp_path / "a.zraw" if suffix == ".mhd" else path
    content = bytearray(data.read_bytes())
    content[-30] ^= 0x55
    data.write_bytes(content)
    with pytest.raises(DatasetError, match="truncated or damaged"):
        read_volume(path)


def test_a_header_without_its_voxels(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY), str(tmp_path / "a.mhd"))
    (tmp_path / "a.raw").unlink()
    with pytest.raises(DatasetError, match=r"a\.mhd: truncated or damaged.*file of voxels that its header may name"):
        read_volume(tmp_path / "a.mhd")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    """A limit on the size of files stands in for the disk, in a process of its own."""
    path = tmp_path / f"a{suffix}"
    write_volume(path, Volume(ARRAY, np.eye(4)))
    before = path.read_bytes()
    code = (
        "import resource, sys, numpy as np\n"
        "from mambahome_jax.errors import OutputError\n"
        "from mambahome_jax.imaging.volume import Volume, write_volume\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "array = np.random.default_rng(0).integers(0, 250, (50, 60, 70)).astype(np.uint8)\n"
        "try:\n    write_volume(sys.argv[1], Volume(array, np.eye(4)))\n"
        "except OutputError as error:\n    print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"{tmp_path}: cannot write a{suffix}: ") and "free some space" in shown
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(DatasetError, match=r'SimpleITK.*Run: pip install "mambahome-jax\[formats\]"'):
        read_volume(tmp_path / "a.mha")
    with pytest.raises(DatasetError, match=r'pip install "mambahome-jax\[formats\]"'):
        read_volume(tmp_path)
    with pytest.raises(OutputError, match=r'pip install "mambahome-jax\[formats\]"'):
        write_volume(tmp_path / "a.nrrd", Volume(ARRAY, np.eye(4)))
    assert not list(tmp_path.iterdir())
