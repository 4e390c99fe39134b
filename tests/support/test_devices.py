"""Options for XLA: those that the version knows, and the user's own come first."""

import contextlib
import mmap
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from mambahome_jax.support import devices


@pytest.fixture(autouse=True)
def fresh():
    devices.compiler_options.cache_clear()
    yield
    devices.compiler_options.cache_clear()


def test_options_that_this_version_does_not_know_are_left_out(monkeypatch):
    known = {"xla_backend_optimization_level": "1"}
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": known | {"xla_no_such_option": True}})
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices.compiler_options() == known


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": {"xla_backend_optimization_level": "1"}})
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert devices.compiler_options() == {}


def test_no_options_where_there_are_none(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"gpu": {"xla_no_such_option": True}})
    assert devices.compiler_options() == {}


def test_less_memory_is_a_matter_of_those_who_ask_for_it(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": {"xla_backend_optimization_level": "1"}})
    monkeypatch.setattr(devices, "_LESS_MEMORY", {"cpu": {"xla_gpu_enable_latency_hiding_scheduler": False}})
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices.compiler_options() == {"xla_backend_optimization_level": "1"}
    assert devices.compiler_options(less_memory=True)["xla_gpu_enable_latency_hiding_scheduler"] is False


@pytest.mark.parametrize(("installed", "gib"), [((), None), (("jax-cuda13-plugin",), 80.0)])
def test_a_gpu_that_jax_has_no_plugin_for_does_not_count(monkeypatch, installed, gib):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: subprocess.CompletedProcess(args, 0, "81920\n"))
    monkeypatch.setattr(metadata, "distributions", lambda name: iter([object()] if name in installed else []))
    assert devices.gpu_memory_gib() == gib


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 0.75),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".114"}, 0.114),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9),
        ({"XLA_CLIENT_MEM_FRACTION": "much"}, 0.75),
    ],
)
def test_the_part_of_a_gpu_that_the_environment_leaves_to_jax(monkeypatch, variables, share):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.jax_share() == share


def test_what_xla_reads_of_the_libraries_of_cuda(tmp_path):
    opened = [tmp_path / name for name in ("libcudnn.so.9", "libcublasLt.so.13", "libcusolver.so.12")]
    for path in (*opened, tmp_path / "libcudnn_engines_precompiled.so.9"):
        path.write_bytes(b"code")
    with contextlib.ExitStack() as stack:
        for path in opened:
            file = stack.enter_context(path.open("rb"))
            stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if not Path("/proc/self/maps").exists():
            pytest.skip("no list of the files in this process")
        names = [path.name for path in devices.cuda_libraries()]
    assert names[0] == "libcublasLt.so.13" and {*names[1:]} == {"libcudnn.so.9", "libcudnn_engines_precompiled.so.9"}
    assert devices.cuda_libraries(tmp_path / "missing") == []


def test_a_program_ends_while_the_libraries_of_cuda_are_still_read():
    code = (
        "import time; from pathlib import Path; import jax; from mambahome_jax.support import devices; "
        "jax.default_backend = lambda: 'gpu'; devices.cuda_libraries = lambda: [Path('/dev/zero')]; "
        "devices.begin_devices(); time.sleep(1)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=20, check=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.", True),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 62596897504 bytes.", True),
        ("INTERNAL: no such kernel", False),
    ],
)
def test_lack_of_memory_is_known_on_every_device(text, expected):
    assert devices.is_out_of_memory(jax.errors.JaxRuntimeError(text)) is expected
