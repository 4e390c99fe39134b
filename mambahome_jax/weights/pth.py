"""Files of torch.save, without torch and without running anything that the file says.

A .pth file is a zip archive: `<root>/data.pkl` describes the objects, `<root>/data/<key>` holds a storage's bytes. The
description is a pickle, which could call any function; here all but those that put tensors together are inert.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mambahome_jax.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_STORAGE_OF = {np.dtype(dtype): name for name, dtype in _STORAGES.items()}
_DATA_ERRORS = (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
_READ_ERRORS = (*_DATA_ERRORS, MemoryError, RuntimeError, struct.error, pickle.UnpicklingError)


class Unknown:
    """Stand for anything that is neither data nor a tensor."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __call__(self, *args, **kwargs):
        return Unknown()


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Unpickler(pickle._Unpickler):
    """That of the standard library in Python: the one in C fills memory up to whatever number a file gives its memo."""

    # A bytearray is made as large as the file claims before that is read; torch.save never writes one.
    dispatch = {  # noqa: RUF012
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")), encoding="utf-8")
        self._archive, self._root = archive, root
        self._loaded: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): tuple,
        } | {("torch", storage): np.dtype(dtype) for storage, dtype in _STORAGES.items()}
        return known.get((module, name), Unknown)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"a storage of unknown kind {kind!r}")
        return _Storage(dtype, str(key), int(size))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
        data = self._loaded.get(storage.key)
        if data is None:
            data = np.frombuffer(self._archive.read(f"{self._root}data/{storage.key}"), storage.dtype)
            self._loaded[storage.key] = data
        if min((offset, *shape, *strides), default=0) < 0:
            raise pickle.UnpicklingError("a tensor with negative sizes or strides")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= data.size:
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} beyond the end of its storage")
        if math.prod(shape) > data.size:
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)}, larger than its storage")
        if not math.prod(shape):
            return np.zeros(shape, data.dtype)
        in_bytes = tuple(stride * data.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(data[offset:], tuple(shape), in_bytes, writeable=False)


def _require_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raise BadZipFile where the members are more than the file's `size` bytes: torch.save does not compress."""
    claimed = sum(member.file_size for member in archive.infolist())
    if claimed > size:
        raise zipfile.BadZipFile(f"{claimed} bytes in a file of {size}")


def read_pth(path: Path) -> Any:
    """Read what torch.save wrote, tensors as numpy arrays (bfloat16 too). Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("data.pkl")]
            if not roots:
                raise CheckpointError(f"{path}: no data.pkl inside; expected a file written by torch.save")
            root = min(roots, key=len)
            _require_stored(archive, path.stat().st_size)
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise CheckpointError(f"{path}: big-endian; expected a file written on a little-endian machine")
            return _Unpickler(archive, root).load()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: damaged, or in torch's format from before version 1.6; expected a zip archive of torch.save. "
            "Copy it again, or save it anew with a current torch"
        ) from error
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); expected a file of torch.save. Copy it again"
        ) from error


def write_pth(path: Path, tensors: Mapping[str, np.ndarray], others: Mapping[str, Any], key: str = "model") -> None:
    """Write {key: tensors, **others} for torch.load(path, weights_only=True). OSError passes through.

    An array that stands under several names is written once, as torch.save does.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    keys = {identity: str(number) for number, identity in enumerate(dict.fromkeys(map(id, arrays.values())))}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _describe(key, arrays, keys, others))
        archive.writestr("archive/byteorder", "little")
        for identity, array in {id(array): array for array in arrays.values()}.items():
            archive.writestr(f"archive/data/{keys[identity]}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def _value(value: Any) -> bytes:
    """Opcodes that push a plain value, without header, end and memo, so that pieces can be joined."""
    return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]


def _describe(key: str, arrays: Mapping[str, np.ndarray], keys: Mapping[int, str], others: Mapping[str, Any]) -> bytes:
    """keys: of the storages, by the arrays' identities."""
    ordered = b"ccollections\nOrderedDict\n)R"  # GLOBAL, EMPTY_TUPLE, REDUCE
    out = [b"\x80\x02}(", _value(key), ordered, b"("]
    for name, array in arrays.items():
        strides = tuple(stride // array.itemsize for stride in array.strides)
        out += [_value(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"((", _value("storage")]
        out += [
            f"ctorch\n{_STORAGE_OF[array.dtype]}\n".encode(),
            _value(keys[id(array)]),
            _value("cpu"),
            _value(array.size),
        ]
        out += [b"tQ", _value(0), _value(array.shape), _value(strides), _value(False), ordered, b"tR"]
    out += [b"u", *(_value(part) for entry in others.items() for part in entry), b"u."]
    return b"".join(out)
