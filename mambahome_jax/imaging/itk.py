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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambahome_jax.errors import DatasetError, OutputError
from mambahome_jax.imaging.formats import META_SUFFIXES, suffix_of
from mambahome_jax.imaging.nifti import DamagedError, inflated
from mambahome_jax.support.files import atomic_write, head_of
from mambahome_jax.support.paths import fault_of_letters
from mambahome_jax.support.processes import isolated

INSTALL = 'pip install "mambahome-jax[formats]"'
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AGAIN = "Copy or download it again, with the file of voxels that its header may name."
_LONGEST_REASON, _LONGEST_NAME = 200, 255
_LONGEST_HEADER = 1 << 22  # tables of segments, as Slicer writes them, take some hundred kilobytes
_META_DATA = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*\n", re.MULTILINE)
_NRRD_END = re.compile(rb"\r?\n\r?\n")
_NRRD_DATA = re.compile(rb"^[ \t]*data[ \t]*file[ \t]*:(?!=)[ \t]*(.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)
# As MetaIO takes them: its values of truth begin with T, t or 1.
_META_PACKED = re.compile(rb"^[ \t]*CompressedData[ \t]*[=:][ \t]*[Tt1]", re.MULTILINE)
_META_BINARY = re.compile(rb"^[ \t]*BinaryData[ \t]*[=:][ \t]*[Tt1]", re.MULTILINE)
_META_PACKED_SIZE = re.compile(rb"^[ \t]*CompressedDataSize[ \t]*[=:][ \t]*([0-9]{1,18})\b", re.MULTILINE)
_NRRD_PACKED = re.compile(rb"^encoding:\s*gz", re.MULTILINE | re.IGNORECASE)


class Geometry(NamedTuple):
    """(D0, D1, D2[, C]), and (4, 4), voxel to RAS mm."""

    shape: tuple[int, ...]
    affine: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """Where a header says that the voxels are: in `file` from `start` on. counted: whether their number tells."""

    header: bytes
    file: Path
    start: int
    packed: bool
    counted: bool


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
        fault = "this format is read by SimpleITK, which is not installed"
        raise DatasetError(fault, file=path, expected=".nii or .nii.gz without it", action=f"Run: {INSTALL}") from error
    # Its warnings go past Python to the terminal; what matters here is an error.
    module.ProcessObject.SetGlobalWarningDisplay(False)
    return module


@isolated
def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D0, D1, D2[, C]) as stored, first axis fastest in memory, and affine (4, 4), voxel to RAS mm.

    A fourth axis and several values a voxel both become C.
    Raises DatasetError: SimpleITK is not installed; a missing, truncated or damaged file; voxels in several files or in
    one elsewhere; less than three axes; complex numbers.
    """
    reader, layout = _reader(path)
    _require_whole(path, reader, layout)
    with _damaged(path):
        image = reader.Execute()
    return voxels(path, image), affine_of(image)


@isolated
def read_geometry(path: Path) -> Geometry:
    """Read where the voxels of `read` lie, from the header alone. Raises DatasetError."""
    reader, _ = _reader(path)
    with _damaged(path):
        reader.ReadImageInformation()
    if reader.GetDimension() < 3:
        raise _too_few_axes(path, reader)
    channels = reader.GetNumberOfComponents()
    return Geometry((*reader.GetSize(), *([channels] if channels > 1 else [])), affine_of(reader))


def _reader(path: Path) -> tuple[Any, _Layout]:
    sitk = simpleitk(path)
    if not path.is_file():
        raise DatasetError("cannot be read: not a regular file" if path.exists() else "no such file", file=path)
    layout = _layout_of(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_format(path))
    reader.SetFileName(str(path))
    return reader, layout


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Raises DatasetError where ITK cannot read the file."""
    try:
        yield
    except RuntimeError as error:
        # MetaImageIO adds whatever reason the system gave for something else.
        raise _damaged_file(path, message_of(error, without_system=True)) from error


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
            raise OSError(message_of(error)) from error


def voxels(path: Path, image: Any) -> np.ndarray:
    """(D0, D1, D2[, C]) of an image of SimpleITK, first axis fastest in memory. Raises as `read`."""
    array, dimension = simpleitk(path).GetArrayFromImage(image), image.GetDimension()
    if array.dtype.kind not in "iuf":
        fault = f"voxels of type {image.GetPixelIDTypeAsString()}"
        raise DatasetError(fault, file=path, expected="one integer or real number a voxel")
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


def message_of(error: Exception, *, without_system: bool = False) -> str:
    """The one line that matters of a message of ITK, without addresses in memory."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if without_system:
        lines = [line for line in lines if not line.startswith("Reason:")] or lines
    reason = re.sub(r"^(ITK ERROR: )?(\w+\(0x[0-9a-f]+\): )?(Reason: )?", "", lines[-1]) if lines else "no reason given"
    # Some repeat what a header says, however long it is.
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."


def _layout_of(path: Path) -> _Layout:
    """Read where a header says that the voxels are, which ITK follows wherever it leads.

    Raises DatasetError: a MetaImage without the line that ends its header; other than one plain file beside it.
    """
    head, meta = head_of(path, _LONGEST_HEADER), bool(suffix_of(path.name, META_SUFFIXES))
    end = (_META_DATA if meta else _NRRD_END).search(head)
    header = head[: end.end()] if end else head
    names = [name.decode(errors="replace") for name in (_META_DATA if meta else _NRRD_DATA).findall(header)]
    if meta and (end is None or header.count(b"ElementDataFile") != 1):
        raise _damaged_file(path, "a header without its one last line ElementDataFile")
    if meta and names[0].upper() == "LOCAL":
        names = []
    for name in names:
        _require_beside(path, name)
    packed = (_META_PACKED if meta else _NRRD_PACKED).search(header) is not None
    # NRRD that is not packed is held against its header by ITK.
    counted = packed or (meta and _META_BINARY.search(header) is not None)
    return _Layout(header, path.parent / names[0] if names else path, 0 if names else len(header), packed, counted)


def _require_beside(path: Path, name: str) -> None:
    if name[:4].upper() == "LIST" or "%" in name:
        action = "Write it anew as one file, for example with 3D Slicer or SimpleITK."
        raise DatasetError("voxels in several files", file=path, expected="one file of voxels", action=action)
    shown = repr(name if len(name) < 100 else f"{name[:100]}...")
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise DatasetError(f"its voxels are in {shown}", file=path, expected="the name of a file beside it")
    if len(name) > _LONGEST_NAME or not (path.parent / name).is_file():
        raise _damaged_file(path, f"no file {shown} beside it")


def _require_whole(path: Path, reader: Any, layout: _Layout) -> None:
    """Raise DatasetError where there are other voxels than the header says, or packed ones that are damaged.

    ITK fills up what is missing with whatever the memory holds, and says so on the terminal, if at all, past Python and
    without a file's name: so this comes before it reads them.
    """
    if not layout.counted:
        return
    try:
        size, packed_size = _sizes(layout)
    except (OSError, EOFError, DamagedError) as error:
        raise _damaged_file(path, str(error)) from error
    if not suffix_of(path.name, META_SUFFIXES):
        return
    with _damaged(path):
        reader.ReadImageInformation()
    channels = reader.GetNumberOfComponents()
    one = simpleitk(path).Image([1] * 3, reader.GetPixelID(), channels)
    needed = math.prod(reader.GetSize()) * channels * one.GetSizeOfPixelComponent()
    claimed = _META_PACKED_SIZE.search(layout.header)
    # Without this line MetaIO takes a file of voxels to its end, but a single file for more than there is.
    if layout.packed and (int(claimed[1]) != packed_size if claimed else layout.file == path):
        said = claimed[1].decode() if claimed else "missing"
        raise _damaged_file(path, f"{packed_size} bytes of packed voxels, CompressedDataSize {said}")
    if size < needed or (layout.packed and size > needed):
        raise _damaged_file(path, f"{size} bytes of voxels, {needed} by its header")


def _sizes(layout: _Layout) -> tuple[int, int]:
    """Bytes of the voxels, and bytes that they take in their file. Raises as `inflated`."""
    if not layout.packed:
        size = layout.file.stat().st_size - layout.start
        return size, size
    with layout.file.open("rb") as source:
        source.seek(layout.start)
        return sum(map(len, inflated(source))), source.tell() - layout.start


def _damaged_file(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"truncated or damaged ({reason})", file=path, action=AGAIN)


def _format(path: Path) -> str:
    """The reader is chosen by name, as ITK would otherwise try whatever it finds inside."""
    return "MetaImageIO" if suffix_of(path.name, META_SUFFIXES) else "NrrdImageIO"
