"""The patch store: each case as compressed zarr3 arrays from which a patch is read without the rest of the volume."""

import dataclasses
import json
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorstore as ts

from mambahome_jax.config import Modality
from mambahome_jax.datasets.base import read_json
from mambahome_jax.datasets.label_map import count_values
from mambahome_jax.datasets.prepared import write_json
from mambahome_jax.errors import DatasetError, OutputError, why_not_written
from mambahome_jax.imaging.intensity import IntensityStatistics
from mambahome_jax.patches.foreground import foreground_positions, foreground_sample
from mambahome_jax.support.npz import NPZ_ERRORS
from mambahome_jax.support.paths import as_on_disk, local_path, require_letters

VERSION = 1
# Values of labelled voxels of a CT, (n, channels) float32: what `ct_scale` is made of.
INTENSITIES = "intensities.npy"
CASE_FILE = "case.json"
# Of a checksum: those of the image, before as many of the label map.
CRC_LETTERS = 8

_CHUNK = 64
_CACHE_BYTES = 256 * 2**20
_CACHED_HANDLES = 512
_CACHED_POSITIONS = 512
_ACTION = "Run preprocess.py again."
# A case whose entry is whole would be kept.
_OVERWRITE = "Run preprocess.py again with --overwrite."


@dataclass(frozen=True)
class StoreEntry:
    """What case.json holds.

    shape (D, H, W) voxels; channels; spacing (3,) mm; affine (4, 4), voxel to RAS mm; class_counts: label value ->
    voxels, background included, None without a label; body_box: first and end (exclusive) voxel of the region in which
    patches without a foreground centre are drawn; fingerprint: what the entry was made from; labelled: the label values
    that this case's dataset labels at all, None for all of the table; remarks: what was found and dealt with;
    checksum: of the voxels of image and label map, empty in entries of earlier versions;
    percentiles: SAMPLE_PERCENTILES of each channel of the scan before resampling, empty in stores of earlier versions;
    values: label value -> value that the dataset's label map stores, where the two differ; stored_counts: voxels of
    each stored value but 0 before resampling, empty where that is not known.
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

    @property
    def foreground_counts(self) -> dict[int, int]:
        """Voxels of each class but the background."""
        return {value: count for value, count in (self.class_counts or {}).items() if value != 0}


def write_case(root: Path, entry: StoreEntry, image: np.ndarray, label: np.ndarray | None) -> StoreEntry:
    """Write root/<id>/, whole or not at all; a case that is there is replaced.

    image (D, H, W, C) float32; label (D, H, W) uint8, uint16 or None. Class counts and checksum are taken from them;
    returns the entry with both. Raises OutputError: the folder cannot be written.
    """
    root = local_path(root)
    partial = root / f".{entry.id}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        image = image.astype(np.float32, copy=False)
        _write_array(partial / "image", image)
        if label is not None and label.dtype != np.uint16:
            label = label.astype(np.uint8, copy=False)
        entry = dataclasses.replace(entry, checksum=_checksum(image, label))
        if label is not None:
            _write_array(partial / "label", label)
            entry = dataclasses.replace(entry, class_counts=count_values(label))
            positions = foreground_positions(label)
            arrays: dict[str, Any] = {str(value): index for value, index in positions.items()}
            np.savez(partial / "foreground.npz", **arrays)
            if entry.modality == "ct":
                np.save(partial / INTENSITIES, foreground_sample(image, label))
        else:
            entry = dataclasses.replace(entry, class_counts=None)
        write_json(partial / CASE_FILE, _to_json(entry), indent=None)
        _replace_folder(partial, root / entry.id)
    except OSError as error:
        reason = f"{root / entry.id}: cannot be written: {why_not_written(error)}"
        raise OutputError(f"{reason}. Free some space or name another output folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry


def rewrite_label(root: Path, entry: StoreEntry, label: np.ndarray, table: Mapping[int, int]) -> StoreEntry:
    """Give a case that is there a label map of other values; returns its new entry, which is written last.

    label (D, H, W) uint8 or uint16, the values of `entry` already replaced by those of `table`, one to one.
    Raises OutputError: the folder cannot be written, and the case counts as not done.
    """
    root = local_path(root)
    folder = as_on_disk(root / entry.id)
    partial = root / f".{entry.id}.{os.getpid()}.partial"
    counts = {table.get(value, value): count for value, count in (entry.class_counts or {}).items()}
    # The voxels of the image stay, and with them its part.
    checksum = entry.checksum and entry.checksum[:CRC_LETTERS] + _crc(label)
    entry = dataclasses.replace(entry, class_counts=counts, checksum=checksum)
    remove_entry(root, entry.id)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_array(partial / "label", label)
        with np.load(folder / "foreground.npz", allow_pickle=False) as archive:
            arrays: dict[str, Any] = {str(table.get(int(name), int(name))): archive[name] for name in archive.files}
        np.savez(partial / "foreground.npz", **arrays)
        shutil.rmtree(folder / "label")
        for name in ("label", "foreground.npz"):
            (partial / name).replace(folder / name)
        write_json(folder / CASE_FILE, _to_json(entry), indent=None)
    except NPZ_ERRORS as error:
        reason = f"{folder}: cannot be written: {why_not_written(error)}"
        raise OutputError(f"{reason}. Free some space or name another output folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry


def read_label(root: Path, case: str) -> np.ndarray:
    """Label map of a case, (D, H, W) uint8 or uint16, whole. Raises DatasetError: damaged or missing files."""
    path = Path(root) / case / "label"
    try:
        return ts.open(_spec(path), open=True, read=True).result().read().result()
    except (ValueError, OSError) as error:
        raise _damaged(case, path, error) from error


def read_case(root: Path, case: str) -> StoreEntry | None:
    """Entry of one case, None where it is not there or cannot be read."""
    try:
        return _from_json(read_json(as_on_disk(Path(root) / case / CASE_FILE)))
    except (DatasetError, KeyError, TypeError, ValueError):
        return None


def rewrite_entry(root: Path, entry: StoreEntry) -> None:
    """Replace what a case that is there says of itself. Raises OutputError."""
    write_json(Path(root) / entry.id / CASE_FILE, _to_json(entry), indent=None)


def write_index(root: Path, entries: list[StoreEntry]) -> None:
    """Write root/index.json with the entries of all cases. Raises OutputError."""
    content = {"version": VERSION, "cases": [_to_json(entry) for entry in entries]}
    write_json(Path(root) / "index.json", content, indent=None)


def remove_index(root: Path) -> None:
    """Remove root/index.json, so that nobody reads a store which is being changed. Raises OutputError."""
    _remove(Path(root) / "index.json")


def remove_case(root: Path, case: str) -> None:
    """Remove what there is of a case, as far as that can be removed."""
    shutil.rmtree(Path(root) / case, ignore_errors=True)


def remove_entry(root: Path, case: str) -> None:
    """Mark a case as not done, before what it was made into changes. Raises OutputError."""
    _remove(Path(root) / case / CASE_FILE)


class Store:
    """Read access to a patch store, from any thread; can be pickled for other processes.

    root: the folder that holds index.json, or the preprocessed folder above it. Memory stays bounded whatever the
    number of cases: decoded chunks, open arrays and positions each have a limit.
    """

    _headers: ClassVar = threading.Lock()

    def __init__(self, root: str | Path):
        root = local_path(root)
        require_letters(root)
        self.root = root / "store" if (root / "store").is_dir() else root
        file = self.root / "index.json"
        if not file.is_file():
            raise DatasetError("no such file: preprocessing did not reach its end", file=file, action=_ACTION)
        content = read_json(file)
        if content.get("version") != VERSION:
            raise DatasetError(
                f"version {content.get('version')!r}", file=file, expected=f"version {VERSION}", action=_ACTION
            )
        try:
            entries = [_from_json(entry) for entry in content["cases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"damaged ({type(error).__name__}: {error})", file=file, action=_ACTION) from error
        self._entries = {entry.id: entry for entry in entries}
        self._open_caches()

    @property
    def cases(self) -> tuple[str, ...]:
        """Ids of all cases."""
        return tuple(self._entries)

    def entry(self, case: str) -> StoreEntry:
        """What is known of a case. Raises DatasetError: no such case."""
        try:
            return self._entries[case]
        except KeyError:
            found = f"no case {case!r} among {len(self._entries)}"
            raise DatasetError(found, file=self.root / "index.json", action=_ACTION) from None

    def read_image(
        self, case: str, start: tuple[int, ...] = (0, 0, 0), stop: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Part [start, stop) of the image, (d, h, w, C) float32, as stored (not normalised).

        What lies outside the volume is cut off, so the result may be smaller than stop - start: the caller pads.
        Raises DatasetError: no such case, or damaged files.
        """
        return self._read(case, "image", start, stop)

    def read_label(
        self, case: str, start: tuple[int, ...] = (0, 0, 0), stop: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Part [start, stop) of the label map, (d, h, w) uint8 (uint16 beyond 255), cut off like `read_image`.

        Raises DatasetError: no such case, no label, or damaged files.
        """
        if self.entry(case).class_counts is None:
            raise DatasetError("has no label", case=case, file=self.root / case)
        return self._read(case, "label", start, stop)

    def foreground(self, case: str) -> dict[int, np.ndarray]:
        """Voxel positions of each class but the background, int32 (n, 3): see `foreground_positions`."""
        return {value: self.class_positions(case, value) for value in self.entry(case).foreground_counts}

    def class_positions(self, case: str, value: int) -> np.ndarray:
        """Voxel positions of one class, int32 (n, 3). Raises DatasetError: damaged or missing file."""
        return self._cached(
            self._positions, (case, value), _CACHED_POSITIONS, lambda: self._load_positions(case, value)
        )

    def _read(self, case: str, name: str, start: tuple[int, ...], stop: tuple[int, ...] | None) -> np.ndarray:
        shape = self.entry(case).shape
        stop = shape if stop is None else stop
        region = tuple(
            slice(min(max(a, 0), n), max(min(b, n), min(max(a, 0), n)))
            for a, b, n in zip(start, stop, shape, strict=True)
        )
        array = self._cached(self._handles, (case, name), _CACHED_HANDLES, lambda: self._open(case, name))
        try:
            return array[region].read().result()
        except (ValueError, OSError) as error:
            raise _damaged(case, self.root / case / name, error) from error

    def _open(self, case: str, name: str) -> ts.TensorStore:
        try:
            return ts.open(_spec(self.root / case / name), open=True, read=True, context=self._context).result()
        except (ValueError, OSError) as error:
            raise _damaged(case, self.root / case / name, error) from error

    def _load_positions(self, case: str, value: int) -> np.ndarray:
        try:
            # One thread at a time: NumPy parses the header as Python source, which CPython 3.11 does not do in two
            # threads at once (SystemError: AST constructor recursion depth mismatch).
            with (
                self._headers,
                as_on_disk(self.root / case / "foreground.npz").open("rb") as file,
                np.load(file, allow_pickle=False) as archive,
            ):
                return archive[str(value)]
        except NPZ_ERRORS as error:
            raise _damaged(case, self.root / case / "foreground.npz", error) from error

    def _cached(self, cache: OrderedDict, key: Hashable, limit: int, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in cache:
                cache.move_to_end(key)
                return cache[key]
        value = make()
        with self._lock:
            cache[key] = value
            while len(cache) > limit:
                cache.popitem(last=False)
        return value

    def _open_caches(self) -> None:
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._handles: OrderedDict = OrderedDict()
        self._positions: OrderedDict = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()


def _damaged(case: str, file: Path, error: Exception) -> DatasetError:
    # TensorStore adds all of its settings to a reason.
    reason = str(error).splitlines()[0].split(" [tensorstore_spec=")[0]
    return DatasetError(f"cannot be read ({reason})", case=case, file=file, action=_OVERWRITE)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{file}: cannot be removed: {error.strerror or error}") from error


def _checksum(image: np.ndarray, label: np.ndarray | None) -> str:
    """Tells two states of one case apart, for which 32 bits an array do; a cryptographic digest takes several times as
    long."""
    return _crc(image) + ("" if label is None else _crc(label))


def _crc(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):0{CRC_LETTERS}x}"


def _spec(path: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(as_on_disk(path))},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def _write_array(path: Path, array: np.ndarray) -> None:
    """One zarr3 array in a single shard file: thousands of chunk files a case would exhaust a file system's inodes."""
    chunk = [min(_CHUNK, n) for n in array.shape[:3]] + list(array.shape[3:])
    shard = [-(-n // c) * c for n, c in zip(array.shape, chunk, strict=True)]
    compressor = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 3,
            "shuffle": "bitshuffle",
            "typesize": array.itemsize,
            "blocksize": 0,
        },
    }
    # The checksum: a damaged chunk may decompress without complaint, and training would never know.
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, compressor, {"name": "crc32c"}]
    if array.itemsize == 1:
        codecs[0] = {"name": "bytes"}
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


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; folders cannot be swapped in one step, so the old one is moved aside."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _to_json(entry: StoreEntry) -> dict[str, Any]:
    content = dataclasses.asdict(entry)
    if entry.class_counts is not None:
        content["class_counts"] = {str(value): count for value, count in entry.class_counts.items()}
    for name in ("values", "stored_counts"):
        content[name] = {str(key): value for key, value in content[name].items()}
        if not content[name]:
            del content[name]
    # Compared with what is read back, so tuples have to be the lists that JSON makes of them.
    return json.loads(json.dumps(content))


def _from_json(content: dict[str, Any]) -> StoreEntry:
    names = {item.name for item in dataclasses.fields(StoreEntry)}
    values = {key: value for key, value in content.items() if key in names}
    counts, labelled = content["class_counts"], content.get("labelled")
    values |= {
        "labelled": None if labelled is None else tuple(labelled),
        "remarks": tuple(content.get("remarks", ())),
        "percentiles": tuple(tuple(row) for row in content.get("percentiles", ())),
        "shape": tuple(content["shape"]),
        "spacing": tuple(content["spacing"]),
        "affine": tuple(tuple(row) for row in content["affine"]),
        "statistics": IntensityStatistics(**{key: tuple(value) for key, value in content["statistics"].items()}),
        "body_box": tuple(tuple(corner) for corner in content["body_box"]),
        "class_counts": None if counts is None else {int(value): count for value, count in counts.items()},
    }
    values |= {
        name: {int(key): int(value) for key, value in content.get(name, {}).items()}
        for name in ("values", "stored_counts")
    }
    return StoreEntry(**values)
