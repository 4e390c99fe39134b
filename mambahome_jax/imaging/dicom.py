"""A folder of DICOM slices as one volume, through SimpleITK (extra [formats]).

The grid comes from the slices' positions, not from their names or numbers. What else the files say of a patient is not
read: no name, date or free text can reach a result or a message.
"""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging import itk
from mambahome_jax.imaging.formats import (
    MODALITY_LUT,
    PIXELS,
    UNKNOWN,
    content_of,
    dicom_values,
    identify,
    kind_in,
    kind_of,
)
from mambahome_jax.support.console import counted
from mambahome_jax.support.files import head_of, hidden, not_read
from mambahome_jax.support.processes import isolated

# Share of the distance between slices by which one may lie off, as positions are often written with one decimal only.
UNEVEN = 0.1
_ROUNDING = 1e-3  # difference of direction cosines, and of mm between pixels, that counts as rounding
_CONVERT = "Convert the series to NIfTI, for example with dcm2niix."
_NAMED = 20  # slices that a message names one by one
_HEADER = 1 << 14  # bytes in which the header of a slice usually ends
DEEPEST = 8  # levels below a folder in which slices are looked for, as in <patient>/<study>/<series>/
# Classes of objects that lie beside scans and hold no slices: DICOMDIR; raw data, segmentations, registrations, tables
# of values and surfaces; presentation states, reports and key images; structure sets, plans and doses of radiotherapy;
# what Siemens (CSA non-image) and Philips put into exports for their own programs.
_BESIDE = re.compile(
    r"1\.2\.840\.10008\.(1\.3\.10$|5\.1\.4\.1\.1\.(66|67|68|11|88|481|104|9)(\.|$))"
    r"|1\.3\.12\.2\.1107\.5\.9\.1$|1\.3\.46\.670589\.11\.0\.0\.12(\.|$)"
)


@dataclass(frozen=True)
class Series:
    """Files of one series in order of name. uid, number: SeriesInstanceUID and SeriesNumber, empty where not given."""

    uid: str
    number: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Contents:
    """What files are. non_images: DICOM objects that hold no slices. unreadable: files, and why. others: not DICOM."""

    series: tuple[Series, ...]
    non_images: tuple[Path, ...] = ()
    unreadable: tuple[tuple[Path, str], ...] = ()
    others: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Slice:
    """Header of a file. size: (columns, rows). position: (3,) of its first pixel; steps: (3, 2), a step to the next
    column and to the next row; both in LPS mm. thickness: mm, or None."""

    path: Path
    kind: str
    size: tuple[int, int]
    position: np.ndarray
    steps: np.ndarray
    thickness: float | None


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a volume along the normal of their plane, and (4, 4), voxel to RAS mm."""

    slices: list[Slice]
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return (*self.slices[0].size, len(self.slices))


@isolated
def read(folder: Path, series: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Read a series: voxels (columns, rows, slices) float32 with each slice's rescaling applied, and affine (4, 4).

    Raises DatasetError: as `read_stack`; pixels that are damaged, or colours.
    """
    stack = read_stack(folder, series)
    array = np.empty(stack.shape, np.float32, order="F")
    for k, one in enumerate(stack.slices):
        array[:, :, k] = _pixels(one)
    return array, stack.affine


@isolated
def read_stack(folder: Path, series: Collection[str] = ()) -> Stack:
    """Read the headers of the one series of a folder, or of those below it where it holds no slices itself.

    A tilted gantry gives an exact, sheared affine. Files that are no images (reports, structure sets, segmentations)
    and other files are passed over; slices that lack at either end leave no trace. series: UIDs to choose from several.
    Raises DatasetError: SimpleITK is not installed, no slices, several series (with a list), a damaged file, several
    frames in a file, slices of several sizes, directions or pixel spacings, two at one place, missing or uneven ones.
    """
    itk.simpleitk(folder)
    contents = contents_of(folder)
    for path, reason in contents.unreadable:
        raise DatasetError(reason.removeprefix(f"{path}: "), file=path)
    if not contents.series:
        fault, expected = "cannot be read: a folder without DICOM slices", "a folder of DICOM slices, or a scan file"
        raise DatasetError(fault, file=folder, expected=expected, action="Name the folder that holds the slices.")
    slices = [_header(path) for path in _one_series(folder, contents.series, series).paths]
    _require_alike(slices)
    normal = np.cross(slices[0].steps[:, 0], slices[0].steps[:, 1])
    normal /= np.linalg.norm(normal)
    slices.sort(key=lambda one: float(one.position @ normal))
    columns = np.column_stack([slices[0].steps, _step(slices, normal)])
    return Stack(slices, itk.affine_from(columns, slices[0].position))


def _require_whole(path: Path, reader: Any) -> None:
    """Raise DatasetError where ITK would give other values than the file has, without a word."""
    try:
        with path.open("rb") as file:
            values = dicom_values(file, (MODALITY_LUT, PIXELS))
    except OSError as error:
        raise not_read(path, error) from error
    if MODALITY_LUT in values and values[MODALITY_LUT].length:
        # It would leave the stored values as they are.
        fault, expected = "a table of real values (Modality LUT Sequence)", "rescale slope and intercept"
        raise DatasetError(fault, file=path, expected=expected, action=_CONVERT)
    columns, rows = reader.GetSize()[:2]
    bits = (_number(reader, "0028|0002") or 1) * _number(reader, "0028|0100")
    held, needed = values[PIXELS].length if PIXELS in values else UNKNOWN, int(columns * rows * bits / 8)
    # It would fill up what is missing with whatever the memory holds. Packed pixels have no length.
    if held < needed:
        raise _damaged(path, f" ({columns} x {rows} pixels in {held} bytes)")


def _damaged(path: Path, reason: str = "") -> DatasetError:
    expected, action = "a whole DICOM slice", "Copy or export it again, or remove it if it is no slice."
    return DatasetError(f"truncated or damaged{reason}", file=path, expected=expected, action=action)


def _reader(path: Path) -> Any:
    reader = itk.simpleitk(path).ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _header(path: Path) -> Slice:
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path) from error
    if int(np.prod(reader.GetSize()[2:])) != 1 or "MOSAIC" in _text(reader, "0008|0008"):
        fault = "several slices in one file (enhanced DICOM or a mosaic)"
        raise DatasetError(fault, file=path, expected="a slice a file", action=_CONVERT)
    _require_whole(path, reader)
    orientation = _numbers(path, reader, "0020|0037", 6, "ImageOrientationPatient")
    spacing = _numbers(path, reader, "0028|0030", 2, "PixelSpacing")
    between = _text(reader, "0018|0088") or _text(reader, "0018|0050")
    return Slice(
        path,
        kind=re.sub(r"\W", "", _text(reader, "0008|0060")) or "no modality",
        size=reader.GetSize()[:2],
        position=_numbers(path, reader, "0020|0032", 3, "ImagePositionPatient"),
        # The first of PixelSpacing is between rows, so along a column.
        steps=orientation.reshape(2, 3).T * spacing[::-1],
        thickness=float(between) if re.fullmatch(r"\d*\.?\d+", between) else None,
    )


def _text(reader: Any, tag: str) -> str:
    return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _numbers(path: Path, reader: Any, tag: str, count: int, name: str) -> np.ndarray:
    text = _text(reader, tag)
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        values = np.empty(0)
    if len(values) != count or not np.isfinite(values).all():
        action = "A slice without its place cannot be part of a volume: remove the file, or export the series again."
        raise DatasetError(f"no usable {name}", file=path, expected=f"{count} numbers", action=action)
    return values


def _one_series(folder: Path, available: Sequence[Series], asked: Collection[str]) -> Series:
    """The series asked for, or the only one. Raises DatasetError where that is none, or several."""
    chosen = [one for one in available if one.uid in asked] if asked else available
    if len(chosen) == 1:
        return chosen[0]
    # Numbered here, as descriptions in the files are free text that people put names into.
    listed = "".join(
        f"\n  - UID {one.uid or 'missing'}: {counted(len(one.paths), 'slice')}{_form(one.paths[0])}, "
        f"first {one.paths[0].relative_to(folder)}"
        for one in chosen or available
    )
    what = f"{len(chosen)} series" if chosen else f"{len(available)} series, none of them {' or '.join(asked)}"
    action = "Choose one with --series UID, or put each series into a folder of its own."
    raise DatasetError(f"{what}:{listed}\n", file=folder, expected="one", action=action)


def _form(path: Path) -> str:
    """Size and modality of a slice for a list; empty where its header cannot be read."""
    try:
        first = _header(path)
    except DatasetError:
        return ""
    return f" of {first.size[0]} x {first.size[1]} ({first.kind})"


def _require_alike(slices: list[Slice]) -> None:
    """Raises DatasetError where slices differ in size, spacing or direction: those unlike most of them are named."""
    groups: list[list[Slice]] = []
    for one in slices:
        alike = (group for group in groups if _difference(one, group[0]) is None)
        if (group := next(alike, None)) is None:
            groups.append([one])
        else:
            group.append(one)
    most = max(groups, key=len)
    usual = most[0]
    odd = [(one, _difference(one, usual) or ("", "")) for group in groups if group is not most for one in group]
    others = f"the other {len(most)}" if len(most) > 1 else usual.path.name
    if len(odd) == 1:
        one, (fault, expected) = odd[0]
        action = f"Is it a localizer, or of another series than {others}? Put it into another folder."
        raise DatasetError(fault, file=one.path, expected=expected, action=action)
    if odd:
        fault = f"{len(odd)} slices are unlike {others}: "
        fault += _first_of([f"{one.path.name} ({difference})" for one, (difference, _) in odd])
        expected = f"{_size(usual)} and the direction and pixel spacing of {usual.path.name} ({_listed(usual.steps)})"
        action = "Are they localizers, or of another series? Put them into another folder."
        raise DatasetError(fault, file=usual.path.parent, expected=expected, action=action)
    cosines = usual.steps / np.linalg.norm(usual.steps, axis=0).clip(1e-12)
    if abs(cosines[:, 0] @ cosines[:, 1]) > _ROUNDING or not usual.steps.any(axis=0).all():
        expected = "two directions at right angles, and a positive spacing"
        raise DatasetError(f"row and column steps {_listed(usual.steps)}", file=usual.path, expected=expected)


def _difference(one: Slice, usual: Slice) -> tuple[str, str] | None:
    """What is found and expected where a slice cannot be of one volume with another; None where it can."""
    if one.size != usual.size:
        return _size(one), _size(usual)
    if not np.allclose(one.steps, usual.steps, rtol=0, atol=_ROUNDING):
        fault = f"another direction or pixel spacing ({_listed(one.steps)})"
        return fault, f"that of {usual.path.name} ({_listed(usual.steps)})"
    return None


def _size(one: Slice) -> str:
    return f"{one.size[0]} x {one.size[1]} pixels"


def _step(slices: list[Slice], normal: np.ndarray) -> np.ndarray:
    """(3,) LPS mm from a slice to the next, of slices in order."""
    if len(slices) == 1:
        if not slices[0].thickness:
            raise DatasetError("one slice without a thickness", file=slices[0].path, expected="two or more slices")
        return normal * slices[0].thickness
    positions = np.array([one.position for one in slices])
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    names = [f"{slices[k].path.name} and {slices[k + 1].path.name}" for k in range(len(gaps))]
    folder = slices[0].path.parent
    if gaps.min() <= max(1e-3, 0.01 * usual):
        action = "Are these several times, echoes or phases, or a slice twice? Put each into a folder of its own."
        fault = f"two slices at one place: {names[int(gaps.argmin())]}"
        raise DatasetError(fault, file=folder, expected="one slice a place", action=action)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    _require_in_line(slices, positions, normal, usual)
    off = np.linalg.norm(positions - positions[0] - np.outer(np.arange(len(slices)), step), axis=1)
    if off.max() > UNEVEN * usual:
        worst = int(np.abs(gaps - usual).argmax())
        fault = f"missing or uneven slices: {gaps[worst]:.4g} mm between {names[worst]}"
        expected = f"{usual:.4g} mm, as between most of the {len(slices)}"
        action = "Copy or export the series again; are slices missing, or is it made of several stacks?"
        raise DatasetError(fault, file=folder, expected=expected, action=action)
    return step


def _require_in_line(slices: list[Slice], positions: np.ndarray, normal: np.ndarray, usual: float) -> None:
    """Raises DatasetError where slices are shifted within their plane against most: those are named.

    positions: (slices, 3) LPS mm in order. usual: mm between neighbours. A tilted gantry shifts all alike.
    """
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    in_plane = positions - np.outer(positions @ normal, np.median(steps / along[:, None], axis=0))
    off = np.linalg.norm(in_plane - np.median(in_plane, axis=0), axis=1)
    odd = [one.path.name for one, distance in zip(slices, off, strict=True) if distance > UNEVEN * usual]
    if odd and 2 * len(odd) < len(slices):
        fault = f"slices shifted by up to {off.max():.4g} mm within their plane: {_first_of(odd)}"
        expected = f"the place of the other {len(slices) - len(odd)}"
        action = "Are they of another series or stack? Put them into another folder."
        raise DatasetError(fault, file=slices[0].path.parent, expected=expected, action=action)


def _pixels(one: Slice) -> np.ndarray:
    """(columns, rows) of real values."""
    try:
        image = _reader(one.path).Execute()
    except RuntimeError as error:
        reason = itk.message_of(error)
        if b"MONOCHROME1" in head_of(one.path, _HEADER):
            raise _turned_over(one.path, reason) from error
        raise _damaged(one.path, f" ({reason})") from error
    inverse = _text(image, "0028|0004") == "MONOCHROME1"
    if inverse and _text(image, "0028|0100") not in ("8", "16"):
        # ITK turns two of the bytes over.
        raise _turned_over(one.path, f"{_text(image, '0028|0100')} bits a pixel")
    array = itk.voxels(one.path, image)
    if array.ndim != 3:
        action = "Is it a picture, not a scan?"
        raise DatasetError("colours", file=one.path, expected="one value a pixel", action=action)
    return _as_stored(image, array[:, :, 0]) if inverse else array[:, :, 0]


def _turned_over(path: Path, reason: str) -> DatasetError:
    fault = f"MONOCHROME1 in a form that cannot be read ({reason})"
    return DatasetError(fault, file=path, expected="MONOCHROME2", action=_CONVERT)


def _as_stored(image: Any, array: np.ndarray) -> np.ndarray:
    """Turn MONOCHROME1 back, of which ITK gives the real values of `last` - v, so that it looks as on a screen."""
    last = -1 if _text(image, "0028|0103") == "1" else 2 ** int(_text(image, "0028|0101")) - 1
    slope, intercept = (_number(image, tag) for tag in ("0028|1053", "0028|1052"))
    return (slope or 1.0) * last + 2 * intercept - array.astype(np.float64)


def _number(image: Any, tag: str) -> float:
    """Read a number as ITK does; 0 where it is missing or empty."""
    try:
        return float(_text(image, tag).split("\\")[0] or 0)
    except ValueError:
        return 0.0


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _listed(steps: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in steps.T.ravel())


def holds_slices(folder: Path) -> bool:
    """Whether a folder has a DICOM file in it, by its name or its content."""
    return any(map(_is_dicom, files_in(folder)))


def has_series(folder: Path) -> bool:
    """Whether a folder holds slices itself, so that `contents_of` does not look below it."""
    return any(sort_out([path]).series for path in files_in(folder))


def is_scan(folder: Path) -> bool:
    """Whether a folder holds DICOM slices, itself or, where no scan file lies among them, in the folders below it."""
    return holds_slices(folder) or any(map(_is_dicom, files_below(folder)))


def contents_of(folder: Path) -> Contents:
    """What the files of a folder are, or, where it holds no slices, those of the folders below it. Raises DatasetError:
    a folder cannot be read."""
    contents = sort_out(files_in(folder))
    return contents if contents.series else sort_out(files_below(folder))


def sort_out(paths: Iterable[Path]) -> Contents:
    """Sort files by their series; only the first elements of each are read.

    A file that is DICOM by its name alone, or does not name its series, belongs to the only one that there is, else to
    one without a UID.
    """
    series: dict[str, list[Path]] = {}
    numbers: dict[str, str] = {}
    non_images, unreadable, others = [], [], []
    for path in paths:
        try:
            identity = identify(path)
        except OSError as error:
            unreadable.append((path, str(not_read(path, error))))
            continue
        if identity is None and kind_of(path) != "slice":
            others.append(path)
        elif identity is not None and _BESIDE.match(identity.sop_class):
            non_images.append(path)
        else:
            _, uid, number = identity or ("", "", "")
            series.setdefault(uid, []).append(path)
            numbers.setdefault(uid, number)
    if "" in series and len(series) == 2:
        (uid,) = series.keys() - {""}
        series = {uid: sorted(series[uid] + series[""])}
    by_series = (Series(uid, numbers[uid], tuple(files)) for uid, files in series.items())
    return Contents(tuple(by_series), tuple(non_images), tuple(unreadable), tuple(others))


def files_below(folder: Path) -> list[Path]:
    """Files of all folders below one that could be DICOM slices, sorted; none where a scan file lies among them.

    Raises DatasetError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise not_read(error.filename, error) from error

    paths = []
    for home, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        deep = len(Path(home).relative_to(folder).parts) >= DEEPEST
        folders[:] = [] if deep else [name for name in folders if not hidden(name)]
        if any(kind_of(Path(name)) == "scan" and not hidden(name) for name in names):
            return []
        paths += [path for name in names if not hidden(name) and _may_be_slice(path := Path(home, name))]
    return sorted(paths)


def files_in(folder: Path) -> list[Path]:
    """Visible files that could be DICOM slices, sorted. Raises DatasetError: the folder cannot be read."""
    try:
        return sorted(
            path for path in folder.iterdir() if not hidden(path.name) and _may_be_slice(path) and path.is_file()
        )
    except OSError as error:
        raise not_read(folder, error) from error


def _may_be_slice(path: Path) -> bool:
    return kind_in(path) in ("slice", "unknown")


def _is_dicom(path: Path) -> bool:
    return kind_of(path) == "slice" or content_of(path) == "DICOM"
