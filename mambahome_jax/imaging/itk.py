"""MetaImage (.mha, .mhd) and NRRD files through SimpleITK, which the extra [formats] installs.

ITK's world is LPS (x to the patient's left, y to the back), ours RAS. Of a header only the grid is taken over, so that
what a scanner wrote about a patient does not reach a result. SimpleITK is imported at first use.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.formats import META_SUFFIXES, suffix_of
from mambahome_jax.imaging.itk_headers import AGAIN, LONGEST, META_DATA, NRRD_END, require_harmless
from mambahome_jax.imaging.nifti import DamagedError, inflated
from mambahome_jax.support.files import atomic_write, head_of
from mambahome_jax.support.paths import fault_of_letters

INSTALL = "pip install mambahome-jax[formats]"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LONGEST_REASON = 200
# As MetaIO takes them: its values of truth begin with T, t or 1.
_META_PACKED = re.compile(rb"^[ \t]*CompressedData[ \t]*[=:][ \t]*[Tt1]", re.MULTILINE)
_META_BINARY = re.compile(rb"^[ \t]*BinaryData[ \t]*[=:][ \t]*[Tt1]", re.MULTILINE)
_META_PACKED_SIZE = re.compile(rb"^[ \t]*CompressedDataSize[ \t]*[=:][ \t]*([0-9]{1,18})\b", re.MULTILINE)
_NRRD_PACKED = re.compile(rb"^encoding:\s*gz", re.MULTILINE | re.IGNORECASE)


def installed() -> bool:
    """Whether SimpleITK can be imported."""
    return importlib.util.find_spec("SimpleITK") is not None


def simpleitk(path: Path) -> Any:
    """The module SimpleITK, to read `path`. Raises DatasetError: not installed; a path that it cannot be told."""
    if fault := fault_of_letters(str(path)):
        # It would end the whole process.
        raise DatasetError(fault, file=repr(str(path)))
    try:
        module = importlib.import_module("SimpleITK")
    except ImportError as error:
        found = "this format is read by SimpleITK, which is not installed"
        raise DatasetError(found, file=path, expected=".nii or .nii.gz without it", action=f"Run: {INSTALL}") from error
    # Its warnings go past Python to the terminal; what matters here is an error.
    module.ProcessObject.SetGlobalWarningDisplay(False)
    return module


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D0, D1, D2[, C]) as stored, first axis fastest in memory, and affine (4, 4), voxel to RAS mm.

    A fourth axis and several values a voxel both become C.
    Raises DatasetError: SimpleITK is not installed; a missing, truncated or damaged file; voxels in several files or in
    one elsewhere; less than three axes; complex numbers.
    """
    reader = _reader(path)
    _require_whole(path, reader)
    with _damaged(path):
        image = reader.Execute()
    return voxels(path, image), affine_of(image)


def read_geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (D0, D1, D2[, C]) and affine (4, 4) of what `read` gives, from the header alone. Raises DatasetError."""
    reader = _reader(path)
    with _damaged(path):
        reader.ReadImageInformation()
    if reader.GetDimension() < 3:
        raise _too_few_axes(path, reader)
    channels = reader.GetNumberOfComponents()
    return (*reader.GetSize(), *([channels] if channels > 1 else [])), affine_of(reader)


def _reader(path: Path) -> Any:
    sitk = simpleitk(path)
    if not path.is_file():
        raise DatasetError("cannot be read: not a regular file" if path.exists() else "no such file", file=path)
    require_harmless(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_format(path))
    reader.SetFileName(str(path))
    return reader


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Raises DatasetError where ITK cannot read the file."""
    try:
        yield
    except RuntimeError as error:
        # MetaImageIO adds whatever reason the system gave for something else.
        reason = reason_of(error, without_system=True)
        raise DatasetError(f"truncated or damaged ({reason})", file=path, action=AGAIN) from error


def write(path: Path, array: np.ndarray, affine: np.ndarray, names: Mapping[int, str] | None = None) -> None:
    """Write voxels (D0, D1, D2[, C]) and grid to a compressed .mha or .nrrd, whole or not at all.

    affine: (4, 4), voxel to RAS mm. names: of label values, kept in the header as "labels", JSON {"1": "liver"}.
    Raises OutputError: SimpleITK is not installed, a folder that cannot be written, a full disk.
    """
    if fault := fault_of_letters(str(path)):
        raise OutputError(f"{str(path)!r}: cannot be written: {fault}")
    try:
        sitk = simpleitk(path)
    except DatasetError as error:
        raise OutputError(f"{path}: SimpleITK, which writes it, is not installed. Run: {INSTALL}") from error
    axes = (2, 1, 0, *range(3, array.ndim))
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(axes)), isVector=array.ndim == 4)
    columns = (LPS @ affine)[:3]
    spacing = np.linalg.norm(columns[:, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(columns[:, 3].tolist())
    if names:
        image.SetMetaData("labels", json.dumps({str(value): name for value, name in sorted(names.items())}))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO(_format(path))
    writer.UseCompressionOn()
    with atomic_write(path) as partial:
        writer.SetFileName(str(partial))
        try:
            writer.Execute(image)
        except RuntimeError as error:
            raise OSError(reason_of(error)) from error


def voxels(path: Path, image: Any) -> np.ndarray:
    """(D0, D1, D2[, C]) of an image of SimpleITK, first axis fastest in memory. Raises as `read`."""
    array, dimension = simpleitk(path).GetArrayFromImage(image), image.GetDimension()
    if array.dtype.kind not in "iuf":
        found = f"voxels of type {image.GetPixelIDTypeAsString()}"
        raise DatasetError(found, file=path, expected="one integer or real number a voxel")
    if dimension < 3:
        raise _too_few_axes(path, image)
    return array.transpose(*reversed(range(dimension)), *range(dimension, array.ndim))


def _too_few_axes(path: Path, image: Any) -> DatasetError:
    return DatasetError(f"{image.GetDimension()} axes {image.GetSize()}", file=path, expected="three spatial axes")


def affine_of(image: Any) -> np.ndarray:
    """(4, 4) float64, voxel to RAS mm, of an image of SimpleITK with three or four axes."""
    dimension = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    return affine_from(direction * np.array(image.GetSpacing())[:3], np.array(image.GetOrigin())[:3])


def affine_from(columns: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """(4, 4) voxel to RAS mm. columns: (3, 3), a step along each axis in LPS mm; origin: (3,), the first voxel."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return LPS @ affine + 0.0  # no -0.0


def reason_of(error: Exception, *, without_system: bool = False) -> str:
    """The one line that matters of a message of ITK, without addresses in memory."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if without_system:
        lines = [line for line in lines if not line.startswith("Reason:")] or lines
    reason = re.sub(r"^(ITK ERROR: )?(\w+\(0x[0-9a-f]+\): )?(Reason: )?", "", lines[-1]) if lines else "no reason given"
    # Some repeat what a header says, however long it is.
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."


def _require_whole(path: Path, reader: Any) -> None:
    """Raises DatasetError where there are other voxels than the header says, or packed ones that are damaged.

    ITK fills up what is missing with whatever the memory holds, and says so on the terminal, if at all, past Python and
    without a file's name: so this comes before it reads them.
    """
    file, start, packed = _data_of(path)
    if file is None:
        return
    found, taken = _unpacked_bytes(path, file, start) if packed else (file.stat().st_size - start, 0)
    if not suffix_of(path.name, META_SUFFIXES):
        return
    with _damaged(path):
        reader.ReadImageInformation()
    channels = reader.GetNumberOfComponents()
    one = simpleitk(path).Image([1] * 3, reader.GetPixelID(), channels)
    needed = math.prod(reader.GetSize()) * channels * one.GetSizeOfPixelComponent()
    reason = f"{found} bytes of voxels, {needed} by its header" if found < needed or (packed and found > needed) else ""
    if packed:
        claimed = _META_PACKED_SIZE.search(head_of(path, start or LONGEST))
        # Without this line MetaIO takes a file of voxels to its end, but a single file for more than there is.
        if (claimed is None and file == path) or (claimed and int(claimed[1]) != taken):
            reason = f"{taken} bytes of packed voxels, CompressedDataSize {int(claimed[1]) if claimed else 'missing'}"
    if reason:
        raise DatasetError(f"truncated or damaged ({reason})", file=path, action=AGAIN)


def _unpacked_bytes(path: Path, file: Path, start: int) -> tuple[int, int]:
    """Bytes of the voxels that are packed in `file` from `start` on, and bytes that they take there.

    Raises DatasetError: damaged, or without an end.
    """
    try:
        with file.open("rb") as source:
            source.seek(start)
            return sum(map(len, inflated(source))), source.tell() - start
    except (OSError, EOFError, DamagedError) as error:
        raise DatasetError(f"truncated or damaged ({error})", file=path, action=AGAIN) from error


def _data_of(path: Path) -> tuple[Path | None, int, bool]:
    """The file with the voxels of `path`, where in it they start, and whether they are packed; no file where what it
    holds tells nothing of their number."""
    head = head_of(path, LONGEST)
    if suffix_of(path.name, META_SUFFIXES):
        data = META_DATA.search(head)
        header = head[: data.end()] if data else b""
        packed = _META_PACKED.search(header) is not None
        if data is None or not (packed or _META_BINARY.search(header)):
            return None, 0, False
        if data[1].upper() == b"LOCAL":
            return path, data.end(), packed
        other = path.parent / data[1].decode(errors="replace")
        return (other if other.is_file() else None), 0, packed
    end = NRRD_END.search(head)
    return (path, end.end(), True) if end and _NRRD_PACKED.search(head[: end.end()]) else (None, 0, False)


def _format(path: Path) -> str:
    """The reader is chosen by name, as ITK would otherwise try whatever it finds inside."""
    return "MetaImageIO" if suffix_of(path.name, META_SUFFIXES) else "NrrdImageIO"
