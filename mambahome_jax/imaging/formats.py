"""What a file is by its name or by its first bytes: a scan, a DICOM slice and of which series, a format not read.

Facts of DICOM: PS3.5, sections 7.1 (explicit and implicit kinds), 7.5 (sequences and items), 10 (transfer syntaxes).
"""

import contextlib
import io
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from mambahome_jax.errors import DatasetError
from mambahome_jax.support.files import head_of
from mambahome_jax.support.paths import one_form

NIFTI_SUFFIXES = (".nii.gz", ".nii")
META_SUFFIXES = (".mha", ".mhd")
ITK_SUFFIXES = (*META_SUFFIXES, ".nrrd")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
WRITTEN_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
Kind = Literal["scan", "slice", "foreign", "unknown", "other"]

_NIBABEL = """python -c 'import nibabel; nibabel.save(nibabel.load("{name}"), "{stem}.nii.gz")'"""
_SIMPLEITK = """python -c 'import SimpleITK as s; s.WriteImage(s.ReadImage("{name}"), "{stem}.nii.gz")'"""
# Formats that are not read: their endings, what they are, and a command that makes a file of them that is.
_NOT_READ = (
    (".img .hdr .img.gz .hdr.gz", "half of an Analyze or NIfTI pair .hdr/.img", _NIBABEL),
    (".mgz .mgh", "FreeSurfer's format", _NIBABEL),
    (".mnc", "MINC", _NIBABEL),
    (".par .rec", "Philips PAR/REC", _NIBABEL),
    (".head .brik .brik.gz", "AFNI's format", _NIBABEL),
    (".mif .mif.gz", "MRtrix's format", "mrconvert {name} {stem}.nii.gz"),
    (".nhdr", "NRRD with its voxels in another file", _SIMPLEITK),
    (".gipl .gipl.gz", "GIPL", _SIMPLEITK),
    (".vtk", "VTK's format", _SIMPLEITK),
    (".tif .tiff", "TIFF", _SIMPLEITK),
    (".nii.zst", "NIfTI packed by zstd", "zstd -d {name}"),
    (".nii.bz2", "NIfTI packed by bzip2", "bunzip2 {name}"),
    (".nii.xz", "NIfTI packed by xz", "unxz {name}"),
    (".nii.zip", "NIfTI packed by zip", "unzip {name}"),
    (".dcm.gz", "DICOM packed by gzip", "gunzip {name}"),
)
_FOREIGN = {ending: (what, command) for endings, what, command in _NOT_READ for ending in endings.split()}
_ALSO_DICOM = (".img", ".rec")
_FOREIGN_SUFFIXES = tuple(sorted(_FOREIGN, key=len, reverse=True))
# Two files of one image, named once.
_SECOND_HALF = {".hdr": ".img", ".hdr.gz": ".img.gz", ".rec": ".par", ".brik": ".head", ".brik.gz": ".head"}
# Endings of what is no scan, so that its content need not be looked at.
_OTHER_ENDINGS = """
    .json .jsonl .txt .csv .tsv .xml .html .htm .md .rst .pdf .rtf .doc .docx .xls .xlsx .ods .odt .ppt .pptx
    .yaml .yml .toml .ini .cfg .inf .log .lock .png .jpg .jpeg .gif .bmp .svg .webp .ico .mp4 .avi .mov .bval
    .bvec .mat .npy .npz .pkl .h5 .hdf5 .pt .pth .safetensors .py .sh .m .r .ipynb .js .css .zip .tar
    .tgz .7z .rar .exe .dll .so .db .sqlite .stl .obj .ply .gii .annot .label .trk .tck .lta .xfm .sha256 .md5
    .sig .url .lnk
"""
_OTHER = frozenset(_OTHER_ENDINGS.split())
_NIFTI_MAGIC = (b"n+1\0", b"ni1\0")
_HEAD = 352

Tag = tuple[int, int]
SOP_CLASS, SERIES, SERIES_NUMBER = (0x0008, 0x0016), (0x0020, 0x000E), (0x0020, 0x0011)
MODALITY_LUT, PIXELS = (0x0028, 0x3000), (0x7FE0, 0x0010)
UNKNOWN = 0xFFFFFFFF  # length of a value that ends with a mark
_ITEM, _ITEM_ENDS, _SEQUENCE_ENDS = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_TRANSFER = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
_IMPLICIT, _DEFLATED, _BIG = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"
# Kinds whose length has two bytes, and those that have four after two of padding.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US ??".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_DEEPEST = 32  # no object of the standard nests its sequences deeper
_FARTHEST = 1 << 24  # byte up to which elements are looked for; pixels may begin behind large private ones
_LONGEST = 66  # bytes of a value that are kept: more than a UID has
_UID, _DIGITS = re.compile(rb"[0-9.]{1,64}"), re.compile(rb"[0-9]{1,12}")


class Identity(NamedTuple):
    """What a DICOM file says it is; empty where it does not. number: of the series, digits only."""

    sop_class: str
    series: str
    number: str


class Value(NamedTuple):
    """Length of an element's value, which may be UNKNOWN, and the first bytes that it has."""

    length: int
    start: bytes


def suffix_of(name: str, suffixes: tuple[str, ...] = SCAN_SUFFIXES) -> str:
    """Return the one of `suffixes` that a file's name ends in, as the name spells it (.NII.GZ too); empty without."""
    lower = name.lower()
    return next((name[-len(suffix) :] for suffix in suffixes if lower.endswith(suffix)), "")


def scan_stem(path: Path) -> str:
    """Return the file name without the suffix of a scan, its letters composed: one name on every system."""
    return one_form(path.name.removesuffix(suffix_of(path.name)))


def alternatives(suffixes: tuple[str, ...]) -> str:
    """Name suffixes in a message: ".nii.gz, .nii or .mha"."""
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def kind_of(path: Path) -> Kind:
    """Tell by its name what a file is; of what is unknown the content tells, see `content_of`."""
    name = path.name.lower()
    if suffix_of(name):
        return "scan"
    if name.endswith(DICOM_SUFFIXES):
        return "slice"
    if suffix_of(name, _FOREIGN_SUFFIXES):
        return "foreign"
    return "other" if path.suffix.lower() in _OTHER or re.fullmatch(r"dicomdir(;\d+)?", name) else "unknown"


def kind_in(path: Path) -> Kind:
    """As `kind_of`, but of an ending that some devices give to DICOM slices too, by the content."""
    kind = kind_of(path)
    if kind != "foreign" or not path.name.lower().endswith(_ALSO_DICOM):
        return kind
    try:
        return "slice" if is_dicom(path, head_of(path, _HEAD)) else kind
    except (DatasetError, OSError):
        # Named by its ending, whatever it holds.
        return kind


def content_of(path: Path) -> str:
    """Name a file's format by its first bytes, "" for what is no scan. Raises DatasetError: it cannot be read."""
    head = head_of(path, _HEAD)
    if is_dicom(path, head):
        return "DICOM"
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head_of(path, 4096), _HEAD)
        except zlib.error:
            return ""
        return "NIfTI packed by gzip" if head[344:348] in _NIFTI_MAGIC else ""
    if head[344:348] in _NIFTI_MAGIC or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    if re.match(rb"NRRD000\d", head):
        return "NRRD"
    return "MetaImage" if re.match(rb"\s*(ObjectType\s*=\s*Image|NDims\s*=)", head) else ""


def reason_of(path: Path, content: str = "") -> str:
    """Say why a file that could be a scan is not read, and what to do. content: of one of an unknown name."""
    suffix = suffix_of(path.name, _FOREIGN_SUFFIXES).lower()
    if not suffix:
        ending = {"NIfTI": ".nii", "NIfTI packed by gzip": ".nii.gz", "NRRD": ".nrrd", "MetaImage": ".mha"}[content]
        return f"{path}: {content} by its content, but not by its name. Rename it to {path.name}{ending}"
    what, command = _FOREIGN[suffix]
    stem = path.name[: -len(suffix)]
    return f"{path}: {what}, which is not read. Convert it, for example: {command.format(name=path.name, stem=stem)}"


def no_scan(path: Path) -> DatasetError:
    """Make the error of a file that is no scan by its name. Raises DatasetError: it cannot be read."""
    kind = kind_in(path)
    content = "" if kind == "foreign" else content_of(path)
    if kind == "foreign" or content not in ("", "DICOM"):
        return DatasetError(reason_of(path, content))
    fault = "a DICOM file" if content or kind == "slice" else "not a scan by its name"
    action = "For DICOM, name the folder of the slices."
    return DatasetError(fault, file=path, expected=alternatives(SCAN_SUFFIXES), action=action)


def without_second_halves(paths: list[Path]) -> list[Path]:
    """Paths of formats that are not read without those whose image another one of them stands for."""
    names, kept = {path.name.lower() for path in paths}, []
    for path in paths:
        suffix = suffix_of(path.name, _FOREIGN_SUFFIXES).lower()
        first = _SECOND_HALF.get(suffix)
        if first is None or path.name.lower().removesuffix(suffix) + first not in names:
            kept.append(path)
    return kept


def foreign_stem(path: Path) -> str:
    """File name without the ending of a format that is not read."""
    return path.name.removesuffix(suffix_of(path.name, _FOREIGN_SUFFIXES))


def is_dicom(path: Path, head: bytes) -> bool:
    """Whether a file is DICOM: marked as such, or by its elements. head: its first 132 bytes or more.

    Raises OSError.
    """
    if head[128:132] == b"DICM":
        return True
    # Unmarked it begins with group 2 or 8, in either order of bytes: that rules nearly all other files out.
    return head[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and identify(path) is not None


def identify(path: Path) -> Identity | None:
    """Say what a DICOM file says it is; None for a file that is none. Raises OSError: it cannot be read."""
    with path.open("rb") as file:
        marked = file.read(132)[128:] == b"DICM"
        values = dicom_values(file, (SOP_CLASS, SERIES, SERIES_NUMBER))
    texts = []
    for tag, form in ((SOP_CLASS, _UID), (SERIES, _UID), (SERIES_NUMBER, _DIGITS)):
        text = values[tag].start.strip(b" \0") if tag in values else b""
        texts.append(text.decode() if form.fullmatch(text) else "")
    return Identity(*texts) if marked or texts[0] else None


def dicom_values(file: BinaryIO, tags: Collection[Tag]) -> dict[Tag, Value]:
    """Find the outermost elements `tags` of a DICOM file, as far as its elements can be followed. Raises OSError."""
    values: dict[Tag, Value] = {}
    with contextlib.suppress(_DamagedError, zlib.error):
        elements = _Elements(file)
        while (element := elements.next()).tag <= max(tags):
            if element.tag in tags:
                start = elements.file.read(min(element.length, _LONGEST))
                elements.file.seek(-len(start), io.SEEK_CUR)
                values[element.tag] = Value(element.length, start)
            elements.skip(element)
    return values


class _DamagedError(Exception):
    pass


class _Element(NamedTuple):
    tag: Tag
    kind: bytes  # empty where it is implicit
    length: int


class _Elements:
    """The elements behind the meta header of a file, one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.implicit = file, False
        self.order: Literal["little", "big"] = "little"
        file.seek(0)
        head = file.read(1024)
        syntax = match[1] if (match := _TRANSFER.search(head)) else b""
        file.seek(132 if head[128:132] == b"DICM" else 0)
        # The meta header is explicit and little-endian in every file.
        while (start := self._peek())[:2] == b"\x02\0":
            self.skip(self.next())
        if syntax == _DEFLATED:
            self.file = io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _FARTHEST))
            start = self._peek()
        self.order = "big" if syntax == _BIG else "little"
        self.implicit = syntax == _IMPLICIT or start[4:6] not in _SHORT | _LONG

    def next(self) -> _Element:
        """The element that begins here, up to its value."""
        head, order = self._read(8), self.order
        tag, kind = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order)), head[4:6]
        if tag[0] != 0xFFFE and not self.implicit:
            if kind in _SHORT:
                return _Element(tag, kind, int.from_bytes(head[6:], order))
            if kind in _LONG:
                return _Element(tag, kind, int.from_bytes(self._read(4), order))
        # Some devices write implicit elements into sequences of explicit files.
        return _Element(tag, b"", int.from_bytes(head[4:], order))

    def skip(self, element: _Element, depth: int = 0) -> None:
        """Go on behind the value of an element, that of a sequence without a length item by item."""
        if element.length != UNKNOWN:
            self.file.seek(element.length, io.SEEK_CUR)
            return
        if depth > _DEEPEST:
            raise _DamagedError
        # Of a kind that its writer did not know, it is an implicit sequence whatever the file.
        before, self.implicit = self.implicit, self.implicit or element.kind == b"UN"
        while (item := self.next()).tag != _SEQUENCE_ENDS:
            if item.tag != _ITEM:
                raise _DamagedError
            if item.length != UNKNOWN:
                self.skip(item)
                continue
            while (inner := self.next()).tag != _ITEM_ENDS:
                self.skip(inner, depth + 1)
        self.implicit = before

    def _peek(self) -> bytes:
        start = self.file.read(8)
        self.file.seek(-len(start), io.SEEK_CUR)
        return start

    def _read(self, count: int) -> bytes:
        content = self.file.read(count)
        if len(content) < count or self.file.tell() > _FARTHEST:
            raise _DamagedError
        return content
