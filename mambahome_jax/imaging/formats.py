"""Files that could be scans by their names or by their first bytes, among them formats that are not read."""

import re
import zlib
from pathlib import Path
from typing import Literal

from mambahome_jax.errors import DatasetError
from mambahome_jax.imaging.dicom_elements import is_dicom
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
# Endings of formats that are not read: what they are, and a command that makes a file of them that is.
_FOREIGN = {
    ".img": ("half of an Analyze or NIfTI pair .hdr/.img", _NIBABEL),
    ".hdr": ("half of an Analyze or NIfTI pair .hdr/.img", _NIBABEL),
    ".img.gz": ("half of an Analyze or NIfTI pair .hdr/.img", _NIBABEL),
    ".hdr.gz": ("half of an Analyze or NIfTI pair .hdr/.img", _NIBABEL),
    ".mgz": ("FreeSurfer's format", _NIBABEL),
    ".mgh": ("FreeSurfer's format", _NIBABEL),
    ".mnc": ("MINC", _NIBABEL),
    ".par": ("Philips PAR/REC", _NIBABEL),
    ".rec": ("Philips PAR/REC", _NIBABEL),
    ".head": ("AFNI's format", _NIBABEL),
    ".brik": ("AFNI's format", _NIBABEL),
    ".brik.gz": ("AFNI's format", _NIBABEL),
    ".mif": ("MRtrix's format", "mrconvert {name} {stem}.nii.gz"),
    ".mif.gz": ("MRtrix's format", "mrconvert {name} {stem}.nii.gz"),
    ".nhdr": ("NRRD with its voxels in another file", _SIMPLEITK),
    ".gipl": ("GIPL", _SIMPLEITK),
    ".gipl.gz": ("GIPL", _SIMPLEITK),
    ".vtk": ("VTK's format", _SIMPLEITK),
    ".tif": ("TIFF", _SIMPLEITK),
    ".tiff": ("TIFF", _SIMPLEITK),
    ".nii.zst": ("NIfTI packed by zstd", "zstd -d {name}"),
    ".nii.bz2": ("NIfTI packed by bzip2", "bunzip2 {name}"),
    ".nii.xz": ("NIfTI packed by xz", "unxz {name}"),
    ".nii.zip": ("NIfTI packed by zip", "unzip {name}"),
    ".dcm.gz": ("DICOM packed by gzip", "gunzip {name}"),
}
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
    """What a file is by its name: a scan, a DICOM slice, of a format that is not read, unknown, or no scan.

    Of what is unknown the content tells: see `content_of`.
    """
    name = path.name.lower()
    if suffix_of(name):
        return "scan"
    if name.endswith(DICOM_SUFFIXES):
        return "slice"
    if suffix_of(name, _FOREIGN_SUFFIXES):
        return "foreign"
    return "other" if path.suffix.lower() in _OTHER or re.fullmatch(r"dicomdir(;\d+)?", name) else "unknown"


def kind_in(path: Path) -> Kind:
    """`kind_of`, but of an ending that some devices give to DICOM slices too, by the content."""
    kind = kind_of(path)
    if kind != "foreign" or not path.name.lower().endswith(_ALSO_DICOM):
        return kind
    try:
        return "slice" if is_dicom(path, head_of(path, _HEAD)) else kind
    except (DatasetError, OSError):
        # Named by its ending, whatever it holds.
        return kind


def content_of(path: Path) -> str:
    """What a file is by its first bytes: "DICOM", the name of another format, or "" for what is no scan.

    Raises DatasetError: it cannot be read.
    """
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
    """Why a file that could be a scan is not read, and what to do. content: `content_of` one of an unknown name."""
    suffix = suffix_of(path.name, _FOREIGN_SUFFIXES).lower()
    if not suffix:
        ending = {"NIfTI": ".nii", "NIfTI packed by gzip": ".nii.gz", "NRRD": ".nrrd", "MetaImage": ".mha"}[content]
        return f"{path}: {content} by its content, but not by its name. Rename it to {path.name}{ending}"
    what, command = _FOREIGN[suffix]
    stem = path.name[: -len(suffix)]
    return f"{path}: {what}, which is not read. Convert it, for example: {command.format(name=path.name, stem=stem)}"


def no_scan(path: Path) -> DatasetError:
    """What to raise for a file that is no scan by its name: what it is, and what to do. Raises DatasetError: it cannot
    be read."""
    kind = kind_in(path)
    content = "" if kind == "foreign" else content_of(path)
    if kind == "foreign" or content not in ("", "DICOM"):
        return DatasetError(reason_of(path, content))
    found = "a DICOM file" if content or kind == "slice" else "not a scan by its name"
    action = "For DICOM, name the folder of the slices."
    return DatasetError(found, file=path, expected=alternatives(SCAN_SUFFIXES), action=action)


def without_second_halves(paths: list[Path]) -> list[Path]:
    """Paths of formats that are not read without those whose image another one of them stands for."""
    names = {path.name.lower() for path in paths}

    def stands_alone(path: Path) -> bool:
        suffix = suffix_of(path.name, _FOREIGN_SUFFIXES).lower()
        first = _SECOND_HALF.get(suffix)
        return first is None or path.name.lower().removesuffix(suffix) + first not in names

    return [path for path in paths if stands_alone(path)]


def foreign_stem(path: Path) -> str:
    """File name without the ending of a format that is not read."""
    suffix = suffix_of(path.name, _FOREIGN_SUFFIXES)
    return path.name[: -len(suffix)] if suffix else path.name
