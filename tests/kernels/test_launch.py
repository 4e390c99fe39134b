"""How the Pallas kernels are named and compiled, without a GPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from mambahome_kernels import conv3d, selective_scan

if jax.__version_info__ < (0, 11):
    pytest.skip(f"the kernels need JAX 0.11; this is {jax.__version__}", allow_module_level=True)

from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from mambahome_kernels.mosaic import launch, runtime

ARRAYS = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 8, 16, 16, 16), (3, 3, 3, 16, 16))]


class Client:
    def __init__(self):
        self.programs = []

    def compile_and_load(self, program, devices):
        self.programs.append(program)


@pytest.fixture
def client(monkeypatch):
    class Device:
        platform, compute_capability, client = "gpu", "9.0", Client()

    jax.clear_caches()
    monkeypatch.setattr(launch, "default_device", lambda: Device)
    monkeypatch.setattr(runtime, "default_device", lambda: Device)
    monkeypatch.setattr(launch, "_AHEAD", {})
    return Device.client


def lowered(function) -> str:
    return jax.jit(function).trace(*ARRAYS).lower(lowering_platforms=("cuda",)).as_text()


def hashes(text: str) -> list[str]:
    return re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)


def test_a_kernel_is_the_same_in_every_program(client):
    """JAX's caches know it by its code; a number given by the process would make it another each time."""
    first = hashes(lowered(lambda x, kernel: conv3d(x, kernel)))
    jax.clear_caches()
    assert first == hashes(lowered(lambda x, kernel: conv3d(x + 1, kernel)))
    assert len(first) == 1


def test_kernels_begin_to_compile_while_the_program_is_lowered(client):
    """Each once, as a program of its own that XLA can read."""
    text = lowered(lambda x, kernel: conv3d(conv3d(x, kernel), kernel) + conv3d(x * 2, kernel))
    for future in launch._AHEAD.values():
        future.result()
    assert len(client.programs) == len(set(hashes(text))) == 1
    with mlir.make_ir_context():
        module = ir.Module.parse(client.programs[0])
        assert module.operation.verify()
        assert hashes(str(module)) == hashes(text)[:1]


def test_the_assembler_is_asked_for_its_version_once(client, monkeypatch):
    """Not at each branch of a kernel, as it is a process to start each time."""
    bindings = getattr(fragmented_array.mgpu_lib, "_mosaic_gpu_ext", None)
    if bindings is None:
        pytest.skip("JAX has no bindings of Mosaic without its CUDA plugin")
    asked = []
    monkeypatch.setattr(bindings, "_get_ptxas_isa_version", lambda: asked.append(None) or 90)
    before = bindings._get_ptxas_isa_version
    lowered(lambda x, kernel: conv3d(x, kernel))
    assert len(asked) == 1
    assert bindings._get_ptxas_isa_version is before


def test_nothing_is_compiled_for_a_device_that_is_not_here(client, monkeypatch):
    monkeypatch.setattr(launch.default_device(), "client", None)
    lowered(lambda x, kernel: conv3d(x, kernel))
    assert not launch._AHEAD


@pytest.fixture
def cache(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_kernel_that_an_earlier_process_lowered_is_not_lowered_again(client, cache, monkeypatch):
    first = lowered(lambda x, kernel: conv3d(x, kernel) * 2)
    (kept,) = (cache / "mosaic").iterdir()
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "kernel", lambda *_, **__: None)
        assert lowered(lambda x, kernel: conv3d(x, kernel) * 2) == first
    jax.clear_caches()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert lowered(lambda x, kernel: conv3d(x, kernel) * 2) == first


def test_a_kernel_with_other_results_is_another(client, cache):
    """Inference keeps no states for the gradients: of the same sizes its kernels are not those of training."""
    wide, thin, rates = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 64, 32), (2, 64, 8), (32, 8)))

    def scan(x, dt, A, B, C):
        return selective_scan(x, dt, A, B, C, backend="mosaic_gpu")[0]

    def lower(function):
        jax.clear_caches()
        traced = jax.jit(function).trace(wide, wide, rates, thin, thin)
        return hashes(traced.lower(lowering_platforms=("cuda",)).as_text())

    def train(*arrays):
        return jax.grad(lambda x: scan(x, *arrays[1:]).sum())(arrays[0])

    kept = lower(train), lower(scan)
    jax.config.update("jax_compilation_cache_dir", None)
    assert kept == (lower(train), lower(scan))
    assert len(set(kept[1]) - set(kept[0])) == 1
