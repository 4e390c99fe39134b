"""Files of weights from anywhere: nothing in them runs, and what they claim is not allocated before it is there."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

from mambahome_jax.errors import CheckpointError
from mambahome_jax.weights.checkpoint import _require_held
from mambahome_jax.weights.weights import read_weights

MOST = 20_000_000  # bytes


class Runs:
    """Pickles to a call that creates a file."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        code = f"open({self.path!r}, 'w')"
        calls = {"system": (os.system, (f"touch {self.path}",)), "eval": (eval, (code,)), "exec": (exec, (code,))}
        return calls[self.how]


def archive(path, description, members=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", description)
        for name, content in members:
            file.writestr(name, content)


def tensor(shape, strides, size=4):
    """Pickle of {"model": {"w": a tensor of that shape over a storage of `size` floats}}, as torch.save has it."""
    body = b"\x80\x02}X\x05\0\0\0model}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
    body += b"ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    plain = [pickle.dumps(value, 2)[2:-1] for value in (size, 0, shape, strides, False)]
    return body + plain[0] + b"tQ" + b"".join(plain[1:]) + b"ccollections\nOrderedDict\n)RtRss."


def refused(path):
    """The message; less than MOST bytes were taken for it."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("how", ["system", "eval", "exec"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npz", ".safetensors"])
def test_code_in_a_file_does_not_run(tmp_path, how, suffix):
    path, target = tmp_path / f"w{suffix}", tmp_path / "created"
    hostile = pickle.dumps({"model": Runs(target, how)})
    contents = {".npz": None, ".safetensors": hostile}
    if suffix in (".pth", ".pt"):
        archive(path, hostile)
    elif suffix == ".npz":
        array = np.empty(1, object)
        array[0] = Runs(target, how)
        np.savez(path, w=array)
    else:
        path.write_bytes(contents[suffix])
    refused(path)
    path.write_bytes(hostile)
    refused(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("shape", "strides", "words"),
    [
        ((1 << 40,), (0,), "larger than its storage"),
        ((1 << 20, 1 << 20, 1 << 20), (0, 0, 0), "larger than its storage"),
        ((-4,), (1,), "negative"),
        ((2,), (-1,), "negative"),
        ((100,), (1,), "beyond the end of its storage"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold(tmp_path, shape, strides, words):
    archive(tmp_path / "w.pth", tensor(shape, strides), [("archive/data/0", bytes(16))])
    assert words in refused(tmp_path / "w.pth")


def test_a_tensor_that_its_storage_holds(tmp_path):
    archive(tmp_path / "w.pth", tensor((2, 2), (2, 1)), [("archive/data/0", bytes(16))])
    assert "larger" not in refused(tmp_path / "w.pth") and "w" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "description",
    [
        b"\x80\x02Nr\xff\xff\xff\x3f.",  # memo entry of a thousand million
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # bytearray of a terabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",  # bytes of a terabyte
        b"\x80\x02}X\x05\0\0\0modelc__main__\nRuns\n)\x81}X\x01\0\0\0aK\x01sbs.",
    ],
)
def test_a_description_that_claims_memory(tmp_path, description):
    archive(tmp_path / "w.pth", description)
    refused(tmp_path / "w.pth")


def test_members_that_unpack_to_far_more(tmp_path):
    archive(tmp_path / "w.pth", bytes(1 << 26), compression=zipfile.ZIP_DEFLATED)
    assert "damaged" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 22), (-5,)])
def test_arrays_that_are_not_in_their_npz(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file:
        file.writestr("w.npy", header.getvalue() + bytes(64))
    assert "claims shape" in refused(tmp_path / "w.npz")


def test_a_safetensors_header_that_claims_more_than_is_there(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + header)
    refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize("field", ["depths", "feat_size", "experts_list", "hidden_size", "out_chans"])
def test_a_configuration_of_a_network_beyond_reason(tmp_path, field):
    value = 10**9 if field in ("hidden_size", "out_chans") else [10**9] * 4
    (tmp_path / "best" / "model").mkdir(parents=True)
    (tmp_path / "best" / "config.json").write_text(json.dumps({"model": {field: value}}))
    assert f"{field} is " in refused(tmp_path / "best") and "expected" in refused(tmp_path / "best")


def test_parameters_that_are_not_in_their_files(tmp_path):
    (tmp_path / "part").write_bytes(bytes(1000))
    _require_held(tmp_path, {"a": jax.ShapeDtypeStruct((1000,), np.float32)})
    with pytest.raises(ValueError, match="4000000000000 bytes of parameters in files of 1000 bytes"):
        _require_held(tmp_path, {"a": jax.ShapeDtypeStruct((10**6, 10**6), np.float32)})


@pytest.mark.parametrize("header", ["{", "(" * 5000, "{'descr': '<f4'", ""])
def test_headers_in_an_npz_that_are_no_python(tmp_path, header):
    path = tmp_path / "a.npz"
    text = header.encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"a\.npz: cannot be read"):
        read_weights(path)
