"""DICOM slices for tests, written byte by byte so that every tag is under control."""

import struct
from pathlib import Path

import numpy as np

CT, MR, RTSTRUCT = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "4", "481.3"))
PATIENT = "Doe^Jane"


def element(group: int, number: int, vr: str, value: str | bytes | int) -> bytes:
    """A data element, explicit VR little endian."""
    if isinstance(value, int):
        value = struct.pack("<H", value)
    if isinstance(value, str):
        value = value.encode() + (b"" if len(value) % 2 == 0 else b"\0" if vr == "UI" else b" ")
    size = b"\0\0" + struct.pack("<I", len(value)) if vr in ("OB", "OW") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + vr.encode() + size + value


def write_slice(
    path: Path,
    pixels: np.ndarray,
    position=(0.0, 0.0, 0.0),
    orientation=(1.0, 0, 0, 0, 1, 0),
    spacing=(1.0, 1.0),
    *,
    sop_class: str = CT,
    series: str = "1.2.3.4",
    number: int = 1,
    rescale: tuple[str, str] | None = None,
    frames: int | None = None,
    image_type: str = "ORIGINAL\\PRIMARY\\AXIAL",
    thickness: str = "2.5",
    photometric: str = "MONOCHROME2",
    stored: int = 16,
    signed: bool = True,
) -> Path:
    """One slice. pixels: (rows, columns) int16; spacing: mm between rows, and between columns; rescale: slope and
    intercept, left out where None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    join = lambda values: "\\".join(f"{value:.10g}" for value in values)  # noqa: E731
    rows, columns = pixels.shape[-2:]
    uid = f"{series}.{sum(map(ord, path.name))}.{number}"
    modality = {CT: "CT", MR: "MR", RTSTRUCT: "RTSTRUCT"}[sop_class]
    parts = [
        *(element(8, 8, "CS", image_type), element(8, 0x16, "UI", sop_class), element(8, 0x18, "UI", uid)),
        *(element(8, 0x60, "CS", modality), element(0x10, 0x10, "PN", PATIENT), element(0x10, 0x20, "LO", PATIENT)),
        element(0x18, 0x50, "DS", thickness) if thickness else b"",
        *(element(0x20, 0xD, "UI", "1.2.3"), element(0x20, 0xE, "UI", series), element(0x20, 0x11, "IS", "7")),
        *(element(0x20, 0x13, "IS", str(number)), element(0x20, 0x32, "DS", join(position))),
        *(element(0x20, 0x37, "DS", join(orientation)), element(0x28, 2, "US", 1)),
        element(0x28, 4, "CS", photometric),
        b"" if frames is None else element(0x28, 8, "IS", str(frames)),
        *(element(0x28, 0x10, "US", rows), element(0x28, 0x11, "US", columns)),
        *(element(0x28, 0x30, "DS", join(spacing)), element(0x28, 0x100, "US", 16), element(0x28, 0x101, "US", stored)),
        *(element(0x28, 0x102, "US", stored - 1), element(0x28, 0x103, "US", int(signed))),
        b"" if rescale is None else element(0x28, 0x1052, "DS", rescale[1]) + element(0x28, 0x1053, "DS", rescale[0]),
        element(0x7FE0, 0x10, "OW", pixels.astype("<i2").tobytes()),
    ]
    if sop_class == RTSTRUCT:
        parts = parts[:6]
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", sop_class) + element(2, 3, "UI", uid)
    meta += element(2, 0x10, "UI", "1.2.840.10008.1.2.1") + element(2, 0x12, "UI", "1.2.3.9")
    length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    path.write_bytes(bytes(128) + b"DICM" + length + meta + b"".join(parts))
    return path
