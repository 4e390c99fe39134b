"""The patch store: each case as compressed zarr3 arrays from which a patch is read without the rest of the volume."""

import contextlib
import dataclasses
import functools
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorstore as ts

from mambahome_jax.config import Modality
from mambahome_jax.errors import DatasetError, OutputError, why_not_written
from mambahome_jax.imaging.intensity import IntensityStatistics
from mambahome_jax.imaging.normalisation import CtScale
from mambahome_jax.imaging.plausibility import extent_mm
from mambahome_jax.imaging.volume import count_values
from mambahome_jax.ranges import ScanRanges, StructureRange
from mambahome_jax.support.files import NPZ_ERRORS, read_json, write_json
from mambahome_jax.support.paths import as_on_disk, local_path, require_letters

VERSION = 1
INDEX, CASE_FILE = "index.json", "case.json"
# Values of labelled voxels of a CT, (SAMPLE, channels) float32: what `ct_scale` is made of.
INTENSITIES, SAMPLE = "intensities.npy", 10_000
_MOST_INTENSITIES = 10_000_000  # values at once, all cases together: 40 MB
# Of a checksum: those of the image, before as many of the label map.
CRC_LETTERS = 8

_BODY_ABOVE: dict[Modality, float] = {"ct": -175.0, "mr": 0.0, "us": 0.0}
_POSITIONS = 20_000  # of a class, at most
_CHUNK = 64
_ADDED = ("values", "stored_counts", "contents")  # to case.json, where there are any
_CACHE_BYTES = 256 * 2**20
_CACHED = 512  # open arrays, and as many positions of a class
_AGAIN = "Run preprocess.py again."
# A case whose entry is whole would be kept.
_OVERWRITE = "Run preprocess.py again with --overwrite."


@dataclass(frozen=True)
class StoreEntry:
    """What case.json holds; affine: voxel to RAS mm; what earlier versions lack is empty.

    class_counts: label value -> voxels, background included, None without a label. body_box: first and end (exclusive)
    voxel of the region in which patches without a foreground centre are drawn. fingerprint: what the entry was made
    from. labelled: the label values that this case's dataset labels at all, None for all of the table. checksum: of
    image and label map. percentiles: SAMPLE_PERCENTILES of each channel of the scan before resampling. values: label
    value -> value that the dataset's label map stores, where they differ. stored_counts: voxels of each stored value
    but 0 before resampling. contents: `voxel_digest` of the scan before and after resampling, once where equal.
    """

    id: str
    shape: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    modality: Modality
    statistics: IntensityStatistics
    body_box: tuple[tuple[int, int, int], tuple[int, int, int]]
    class_counts: Mapping[int, int] | None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    labelled: tuple[int, ...] | None = None
    remarks: tuple[str, ...] = ()
    checksum: str = ""
    percentiles: tuple[tuple[float, ...], ...] = ()
    # Not in repr, which fingerprints of datasets are made of: those of earlier versions stay what they are.
    values: Mapping[int, int] = field(default_factory=dict, repr=False)
    stored_counts: Mapping[int, int] = field(default_factory=dict, repr=False)
    contents: tuple[str, ...] = field(default=(), repr=False)

    @property
    def foreground_counts(self) -> dict[int, int]:
        """Voxels of each class but the background."""
        return {value: count for value, count in (self.class_counts or {}).items() if value != 0}


def write_case(root: Path, entry: StoreEntry, image: np.ndarray, label: np.ndarray | None) -> StoreEntry:
    """Write root/<id>/, whole or not at all, and return the entry with checksum and class counts. Raises OutputError.

    image (D, H, W, C) float32; label (D, H, W) uint8, uint16 or None, counted where entry.class_counts is None.
    """
    image = image.astype(np.float32, copy=False)
    if label is not None and label.dtype != np.uint16:
        label = label.astype(np.uint8, copy=False)
    with _partial_folder(root, entry.id) as (partial, folder):
        _write_array(partial / "image", image)
        checksum = _crc(image) + ("" if label is None else _crc(label))
        counts = None if label is None else entry.class_counts or count_values(label)
        entry = dataclasses.replace(entry, checksum=checksum, class_counts=counts)
        if label is not None:
            _write_array(partial / "label", label)
            arrays: dict[str, Any] = {str(value): index for value, index in foreground_positions(label).items()}
            np.savez(partial / "foreground.npz", **arrays)
            if entry.modality == "ct":
                np.save(partial / INTENSITIES, foreground_sample(image, label))
        write_json(partial / CASE_FILE, _to_json(entry), indent=None)
        # Folders cannot be swapped in one step, so the old one is moved aside.
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return entry


def rewrite_label(root: Path, entry: StoreEntry, label: np.ndarray, table: Mapping[int, int]) -> StoreEntry:
    """Replace the label map of a case by one of other values, and return the new entry, which is written last.

    table: value in `entry` -> value in `label` (D, H, W), one to one. Raises OutputError, DatasetError.
    """
    counts = {table.get(value, value): count for value, count in (entry.class_counts or {}).items()}
    # The voxels of the image stay, and with them its part.
    checksum = entry.checksum and entry.checksum[:CRC_LETTERS] + _crc(label)
    entry = dataclasses.replace(entry, class_counts=counts, checksum=checksum)
    remove_entry(root, entry.id)
    with _partial_folder(root, entry.id) as (partial, folder):
        folder = as_on_disk(folder)
        _write_array(partial / "label", label)
        positions = folder / "foreground.npz"
        with _naming_damage(entry.id, positions, NPZ_ERRORS), np.load(positions, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {str(table.get(int(name), int(name))): archive[name] for name in archive.files}
        np.savez(partial / "foreground.npz", **arrays)
        shutil.rmtree(folder / "label")
        for name in ("label", "foreground.npz"):
            (partial / name).replace(folder / name)
        write_json(folder / CASE_FILE, _to_json(entry), indent=None)
    return entry


@contextlib.contextmanager
def _partial_folder(root: Path, case: str) -> Iterator[tuple[Path, Path]]:
    """Give an empty folder to write a case to, and that of the case; turn an OSError into an OutputError."""
    partial, folder = root / f".{case}.{os.getpid()}.partial", root / case
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial, folder
    except OSError as error:
        reason = f"{folder}: cannot be written: {why_not_written(error)}"
        raise OutputError(f"{reason}. Free some space or name another output folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def body_box(image: np.ndarray, modality: Modality) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Find the first and end (exclusive) voxel of the body in image (D, H, W, C); the whole volume where none is."""
    mask = image > _BODY_ABOVE[modality]
    start, stop = [], []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(4) if other != axis)))
        start.append(int(inside[0]) if len(inside) else 0)
        stop.append(int(inside[-1]) + 1 if len(inside) else mask.shape[axis])
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def foreground_positions(label: np.ndarray, limit: int = _POSITIONS) -> dict[int, np.ndarray]:
    """Find the voxels of each class but the background, int32 (n, 3), in C order; of many, always the same sample."""
    flat = label.ravel()
    where = np.flatnonzero(flat)
    # One stable sort by value instead of a pass over the volume for each class.
    where = where[np.argsort(flat[where], kind="stable")]
    values, starts = np.unique(flat[where], return_index=True)
    rng = np.random.default_rng(0)
    positions = {}
    for value, members in zip(values, np.split(where, starts[1:]), strict=False):
        if len(members) > limit:
            members = np.sort(rng.choice(members, limit, replace=False))
        positions[int(value)] = np.stack(np.unravel_index(members, label.shape), axis=1).astype(np.int32)
    return positions


def foreground_sample(image: np.ndarray, label: np.ndarray, size: int = SAMPLE) -> np.ndarray:
    """Sample the labelled voxels of image (D, H, W, C) evenly: (size, C) float32, or (0, C) where none is labelled.

    Some are repeated where there are fewer, so that each case counts the same.
    """
    where = np.flatnonzero(label.ravel())
    chosen = where[np.linspace(0, len(where), size, endpoint=False).astype(np.int64)] if len(where) else where
    return image.reshape(-1, image.shape[-1])[chosen].astype(np.float32)


def whole_label(root: Path, case: str) -> np.ndarray:
    """Read the label map of a case, (D, H, W) uint8 or uint16, of a store without an index yet. Raises DatasetError."""
    path = Path(root) / case / "label"
    array = _open(case, path)
    with _naming_damage(case, path):
        return array.read().result()


def ct_scale(root: Path, cases: Sequence[str]) -> CtScale | None:
    """Measure the labelled voxels of CT cases, each counted the same; None where nothing is labelled.

    Raises DatasetError: a case without its sample, or with a damaged one.
    """
    parts = []
    for case in cases:
        file = root / case / INTENSITIES
        with _naming_damage(case, file, NPZ_ERRORS), file.open("rb") as opened:
            values = np.load(opened, allow_pickle=False)
        step = max(-(-values.size * len(cases) // _MOST_INTENSITIES), 1)
        parts.append(values[::step])
    pooled = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    return CtScale.of_voxels(pooled) if len(pooled) else None


def read_entry(root: Path, case: str) -> StoreEntry | None:
    """Read the entry of one case; None where it is missing or damaged."""
    try:
        return _from_json(read_json(as_on_disk(Path(root) / case / CASE_FILE)))
    except (DatasetError, KeyError, TypeError, ValueError):
        return None


def rewrite_entry(root: Path, entry: StoreEntry) -> None:
    """Replace the entry of a case and leave its arrays. Raises OutputError."""
    write_json(Path(root) / entry.id / CASE_FILE, _to_json(entry), indent=None)


def write_index(root: Path, entries: list[StoreEntry]) -> None:
    """Write root/index.json with the entries of all cases. Raises OutputError."""
    content = {"version": VERSION, "cases": [_to_json(entry) for entry in entries]}
    write_json(Path(root) / INDEX, content, indent=None)


def remove_index(root: Path) -> None:
    """Remove root/index.json, so that nobody reads a store which is being changed. Raises OutputError."""
    _remove(Path(root) / INDEX)


def remove_entry(root: Path, case: str) -> None:
    """Mark a case as not done, before its files change. Raises OutputError."""
    _remove(Path(root) / case / CASE_FILE)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{file}: cannot be removed: {error.strerror or error}") from error


def training_ranges(
    entries: Sequence[StoreEntry], structures: Mapping[int, str], modality: Modality | None = None
) -> tuple[ScanRanges, ...]:
    """Measure the cases that are trained on, one entry a modality; modality: instead of each case's own."""
    groups: dict[Modality, list[StoreEntry]] = {}
    for entry in entries:
        groups.setdefault(modality or entry.modality, []).append(entry)
    return tuple(
        ScanRanges(
            modality=name,
            cases=len(group),
            extent_mm=_ranges(np.array([extent_mm(entry.shape, np.array(entry.affine)) for entry in group])),
            percentiles=_percentiles(group),
            structures=tuple(_structure(group, value, title) for value, title in structures.items()),
        )
        for name, group in sorted(groups.items())
    )


def _percentiles(entries: Sequence[StoreEntry]) -> tuple[tuple[tuple[float, float], ...], ...]:
    percentiles = [entry.percentiles for entry in entries]
    # A store of an earlier version has none, and the ranges of some cases are not those of all.
    return tuple(map(_ranges, np.array(percentiles).transpose(1, 0, 2))) if all(percentiles) else ()


def _structure(entries: Sequence[StoreEntry], value: int, name: str) -> StructureRange:
    labelled = [
        entry
        for entry in entries
        if entry.class_counts is not None and (entry.labelled is None or value in entry.labelled)
    ]
    present = [entry for entry in labelled if value in entry.foreground_counts]
    volumes = [
        entry.foreground_counts[value] * abs(float(np.linalg.det(np.array(entry.affine)[:3, :3]))) / 1000
        for entry in present
    ]
    least, most = (min(volumes), max(volumes)) if volumes else (0.0, 0.0)
    return StructureRange(name, len(labelled), len(present), _short(least), _short(most))


def _ranges(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """(least, largest) of each column of (cases, n)."""
    return tuple((_short(low), _short(high)) for low, high in zip(values.min(axis=0), values.max(axis=0), strict=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


class Store:
    """Read access to a patch store, from any thread and in bounded memory; can be pickled for other processes.

    root: the folder that holds index.json, or the preprocessed folder above it.
    """

    _headers: ClassVar = threading.Lock()

    def __init__(self, root: str | Path):
        root = local_path(root)
        require_letters(root)
        self.root = root / "store" if (root / "store").is_dir() else root
        file = self.root / INDEX
        if not file.is_file():
            raise DatasetError("no such file: preprocessing did not reach its end", file=file, action=_AGAIN)
        content = read_json(file)
        if content.get("version") != VERSION:
            found, expected = f"version {content.get('version')!r}", f"version {VERSION}"
            raise DatasetError(found, file=file, expected=expected, action=_AGAIN)
        try:
            entries = [_from_json(entry) for entry in content["cases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"damaged ({type(error).__name__}: {error})", file=file, action=_AGAIN) from error
        self._entries = {entry.id: entry for entry in entries}
        self._open_caches()

    @property
    def cases(self) -> tuple[str, ...]:
        """Ids of all cases."""
        return tuple(self._entries)

    def entry(self, case: str) -> StoreEntry:
        """Look a case up. Raises DatasetError: no such case."""
        try:
            return self._entries[case]
        except KeyError:
            found = f"no case {case!r} among {len(self._entries)}"
            raise DatasetError(found, file=self.root / INDEX, action=_AGAIN) from None

    def read_image(
        self, case: str, start: tuple[int, ...] = (0, 0, 0), stop: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Read the part of the image from start to stop that the volume has, (d, h, w, C) float32, not normalised.

        Raises DatasetError: no such case, or damaged files.
        """
        return self._region(case, "image", start, stop)

    def read_label(
        self, case: str, start: tuple[int, ...] = (0, 0, 0), stop: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Read a part of the label map likewise, (d, h, w) uint8 or uint16. Raises DatasetError: also without one."""
        if self.entry(case).class_counts is None:
            raise DatasetError("has no label", case=case, file=self.root / case)
        return self._region(case, "label", start, stop)

    def class_positions(self, case: str, value: int) -> np.ndarray:
        """Read the voxel positions of one class, int32 (n, 3). Raises DatasetError: damaged or missing file."""
        return self._positions(case, value)

    def _region(self, case: str, name: str, start: tuple[int, ...], stop: tuple[int, ...] | None) -> np.ndarray:
        shape = self.entry(case).shape
        region = tuple(
            slice(min(max(a, 0), n), max(min(b, n), min(max(a, 0), n)))
            for a, b, n in zip(start, shape if stop is None else stop, shape, strict=True)
        )
        array = self._arrays(case, name)
        with _naming_damage(case, self.root / case / name):
            return array[region].read().result()

    def _open_array(self, case: str, name: str) -> ts.TensorStore:
        return _open(case, self.root / case / name, self._context)

    def _load_positions(self, case: str, value: int) -> np.ndarray:
        file = self.root / case / "foreground.npz"
        # One thread at a time: NumPy parses the header as Python source, which CPython 3.11 does not do in two
        # threads at once (SystemError: AST constructor recursion depth mismatch).
        with (
            _naming_damage(case, file, NPZ_ERRORS),
            self._headers,
            as_on_disk(file).open("rb") as opened,
            np.load(opened, allow_pickle=False) as archive,
        ):
            return archive[str(value)]

    def _open_caches(self) -> None:
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._arrays = functools.lru_cache(_CACHED)(self._open_array)
        self._positions = functools.lru_cache(_CACHED)(self._load_positions)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()


@contextlib.contextmanager
def _naming_damage(
    case: str, file: Path, errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Raise the `errors` of reading a damaged or missing file as a DatasetError of this case and file."""
    try:
        yield
    except errors as error:
        # TensorStore adds all of its settings to a reason.
        reason = str(error).partition("\n")[0].split(" [tensorstore_spec=")[0]
        raise DatasetError(f"cannot be read ({reason})", case=case, file=file, action=_OVERWRITE) from error


def _open(case: str, path: Path, context: ts.Context | None = None) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(as_on_disk(path))},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    with _naming_damage(case, path):
        return ts.open(spec, open=True, read=True, context=context).result()


def _crc(array: np.ndarray) -> str:
    """Tell two states of one array apart; a cryptographic digest takes several times as long as these 32 bits."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):0{CRC_LETTERS}x}"


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write a zarr3 array in a single shard file: thousands of chunk files a case would exhaust the inodes."""
    chunk = [min(_CHUNK, n) for n in array.shape[:3]] + list(array.shape[3:])
    shard = [-(-n // c) * c for n, c in zip(array.shape, chunk, strict=True)]
    blosc = {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "typesize": array.itemsize, "blocksize": 0}
    order = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if array.itemsize > 1 else {})
    # The checksum: a damaged chunk may decompress without complaint, and training would never know.
    codecs = [order, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": list(array.shape),
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": chunk, "codecs": codecs}}],
            "fill_value": 0,
        },
    }
    try:
        ts.open(spec, create=True).result().write(array).result()
    except ValueError as error:
        # TensorStore reports a full disk or a read-only folder as ValueError too.
        raise OSError(str(error).splitlines()[0]) from error


def _to_json(entry: StoreEntry) -> dict[str, Any]:
    content = dataclasses.asdict(entry)
    for name in ("class_counts", "values", "stored_counts"):
        if content[name] is not None:
            content[name] = {str(value): count for value, count in content[name].items()}
    return {name: value for name, value in content.items() if value or name not in _ADDED}


def _from_json(content: dict[str, Any]) -> StoreEntry:
    def by_value(name: str) -> dict[int, int]:
        return {int(value): int(count) for value, count in content.get(name, {}).items()}

    names = {item.name for item in dataclasses.fields(StoreEntry)}
    labelled = content.get("labelled")
    return StoreEntry(
        **{key: value for key, value in content.items() if key in names}
        | {
            "labelled": None if labelled is None else tuple(labelled),
            "remarks": tuple(content.get("remarks", ())),
            "contents": tuple(content.get("contents", ())),
            "percentiles": tuple(tuple(row) for row in content.get("percentiles", ())),
            "shape": tuple(content["shape"]),
            "spacing": tuple(content["spacing"]),
            "affine": tuple(tuple(row) for row in content["affine"]),
            "statistics": IntensityStatistics(**{key: tuple(value) for key, value in content["statistics"].items()}),
            "body_box": tuple(tuple(corner) for corner in content["body_box"]),
            "class_counts": None if content["class_counts"] is None else by_value("class_counts"),
            "values": by_value("values"),
            "stored_counts": by_value("stored_counts"),
        }
    )
