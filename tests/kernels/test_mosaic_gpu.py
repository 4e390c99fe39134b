"""The Pallas GPU kernels without a GPU: their arithmetic in the interpreter, their lowering, and their machine code.

Lowering runs everywhere; machine code only where JAX's CUDA plugin and its assembler are installed.
"""

import contextlib
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mambahome_kernels import Unsupported, choose_backend, selective_scan
from mambahome_kernels.selective_scan import reference
from mambahome_kernels.selective_scan.api import ScanInputs, _scan
from mambahome_kernels.shapes import SCAN_RAGGED, SCAN_STAGES

from tests.conftest import ROOT, load_golden

OFFICIAL = {"x": "u", "dt": "delta", "A": "A", "B": "B", "C": "C", "D": "D", "z": "z", "dt_bias": "delta_bias"}

OLD = jax.__version_info__ < (0, 11)
needs_pallas = pytest.mark.skipif(OLD, reason=f"the kernel needs JAX 0.11 or newer, this is {jax.__version__}")
if not OLD:
    from mambahome_kernels.mosaic.runtime import interpreted
    from mambahome_kernels.selective_scan.mosaic_gpu import backend as mosaic_gpu


def scan_inputs(seed, batch, length, d_inner, d_state, dtype=np.float32, dt_scale=1.0, **absent) -> ScanInputs:
    rng = np.random.default_rng(seed)

    def normal(*shape, kind=dtype):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), kind)

    inputs = ScanInputs(
        x=normal(batch, length, d_inner),
        dt=normal(batch, length, d_inner) * dt_scale,
        A=-jnp.exp(normal(d_inner, d_state, kind=np.float32)),
        B=normal(batch, length, d_state),
        C=normal(batch, length, d_state),
        D=normal(d_inner, kind=np.float32),
        z=normal(batch, length, d_inner),
        dt_bias=normal(d_inner, kind=np.float32),
        initial_state=normal(batch, d_inner, d_state, kind=np.float32),
    )
    return inputs._replace(**dict.fromkeys(absent))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def exact(inputs: ScanInputs, softplus: bool, dy, dlast):
    """Outputs and gradients by the definition in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (inputs, dy, dlast))
        y, last, residual = reference.BACKEND.forward(wide[0], softplus)
        return y, last, reference.BACKEND.backward(wide[0], softplus, residual, *wide[1:])


def check_in_interpreter(
    capfd, inputs: ScanInputs, softplus: bool, bound: float, gradient_bound: float, chunk=None, races=True
):
    rng = np.random.default_rng(9)
    dy = jnp.asarray(rng.standard_normal(inputs.x.shape), inputs.x.dtype)
    dlast = jnp.asarray(rng.standard_normal((inputs.x.shape[0], *inputs.A.shape)), jnp.float32)
    forward = functools.partial(mosaic_gpu.BACKEND.forward, softplus=softplus, keep=True, chunk=chunk)
    backward = functools.partial(mosaic_gpu.BACKEND.backward, softplus=softplus, chunk=chunk)
    with interpreted(detect_races=races):
        y, last, residual = jax.jit(forward)(inputs)
        gradients = jax.jit(lambda i, r, *g: backward(i, residual=r, dy=g[0], dlast_state=g[1]))(
            inputs, residual, dy, dlast
        )
        jax.block_until_ready(gradients)
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    expected_y, expected_last, expected = exact(inputs, softplus, dy, dlast)
    assert y.dtype == inputs.x.dtype
    assert relative(y, expected_y) < bound
    assert relative(last, expected_last) < max(1e-6, bound / 100)
    for name, got, wanted in zip(ScanInputs._fields, gradients, expected, strict=True):
        assert (got is None) == (getattr(inputs, name) is None), name
        if got is not None:
            assert got.dtype == getattr(inputs, name).dtype, name
            assert relative(got, wanted) < gradient_bound, name


@needs_pallas
@pytest.mark.parametrize(("length", "d_inner", "d_state", "chunk"), [(1, 5, 3, None), (7, 33, 8, 8), (21, 40, 4, 8)])
def test_interpreted_kernel_is_the_definition(capfd, length, d_inner, d_state, chunk):
    check_in_interpreter(capfd, scan_inputs(length, 1, length, d_inner, d_state), True, 2e-6, 1e-5, chunk)


@needs_pallas
@pytest.mark.parametrize(("length", "chunk"), [(1023, 256), (1025, 264)])
def test_long_sequences_end_within_a_tile(capfd, length, chunk):
    """Without the search for races, which the short ones have: it takes several times as long."""
    check_in_interpreter(capfd, scan_inputs(length, 1, length, 5, 4), True, 2e-6, 1e-5, chunk, races=False)


@needs_pallas
def test_sixteen_states_and_two_batch_entries(capfd):
    check_in_interpreter(capfd, scan_inputs(3, 2, 9, 8, 16), True, 2e-6, 1e-5)


@needs_pallas
def test_without_extras_and_without_softplus(capfd):
    inputs = scan_inputs(4, 1, 10, 6, 4, D=None, z=None, dt_bias=None, initial_state=None)
    inputs = inputs._replace(dt=jnp.abs(inputs.dt))
    check_in_interpreter(capfd, inputs, False, 2e-6, 1e-5)


@needs_pallas
@pytest.mark.parametrize(("length", "chunk"), [(12, None), (21, 16)], ids=["a tile a copy", "two tiles a copy"])
def test_bfloat16_inputs(capfd, monkeypatch, length, chunk):
    if chunk:
        monkeypatch.setattr(mosaic_gpu, "_FEW_TILES", 0)
    check_in_interpreter(capfd, scan_inputs(5, 1, length, 8, 4, jnp.bfloat16), True, 4e-3, 6e-3, chunk)


@needs_pallas
@pytest.mark.parametrize("dt_scale", [50.0, 1e4])
def test_extreme_steps_under_and_overflow_as_the_definition(capfd, dt_scale):
    """exp(delta A) underflows to 0, softplus is linear on one side and 0 on the other."""
    check_in_interpreter(capfd, scan_inputs(6, 1, 11, 8, 4, dt_scale=dt_scale), True, 2e-6, 1e-5)


@needs_pallas
def test_golden_in_the_interpreter():
    """The published layer's float64 numbers: output, last state and every gradient."""
    data = load_golden("layers_tiny.npz")

    def ours(name, official):
        a = data[official]
        return np.swapaxes(a, 1, 2) if name in ("x", "dt", "z", "B", "C") else a

    inputs = {k: jnp.asarray(ours(k, f"scan77/{o}"), jnp.float32) for k, o in OFFICIAL.items()}
    weights = jnp.asarray(np.swapaxes(data["scan77/R"], 1, 2), jnp.float32)

    def loss(inputs):
        y, last = selective_scan(**inputs, softplus=True, backend="mosaic_gpu")
        return jnp.sum(y * weights), (y, last)

    with interpreted(detect_races=False):
        gradients, (y, last) = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert relative(y, np.swapaxes(data["scan77/out"], 1, 2)) < 2e-6
    assert relative(last, data["scan77/last_state"]) < 2e-6
    for name, official in OFFICIAL.items():
        assert relative(gradients[name], ours(name, f"scan77/grad/{official}")) < 1e-5, name


@needs_pallas
def test_vmap_and_grad():
    inputs = scan_inputs(7, 2, 9, 4, 4)
    arrays = inputs._asdict()

    def loss(x, rest, backend):
        return jnp.sum(jnp.sin(selective_scan(x, **rest, softplus=True, backend=backend)[0]))

    rest = {k: v for k, v in arrays.items() if k != "x"}
    shared = ("A", "D", "dt_bias")
    axes = {k: None if k in shared else 0 for k in rest}
    with interpreted():
        each = {k: v if k in shared else v[:, None] for k, v in rest.items()}
        mapped = jax.vmap(jax.grad(loss), in_axes=(0, axes, None))(arrays["x"][:, None], each, "mosaic_gpu")
    wanted = jax.grad(loss)(inputs.x, rest, "reference")
    np.testing.assert_allclose(np.asarray(mapped)[:, 0], wanted, rtol=1e-4, atol=1e-5)


def both(inputs: ScanInputs, dy):
    def scan(inputs):
        return mosaic_gpu.BACKEND.forward(inputs, True, True)

    y, last, residual = scan(inputs)
    return y, mosaic_gpu.BACKEND.backward(inputs, True, residual, dy, jnp.zeros_like(last))


VARIANTS = [
    (dtype, d_inner, length, 4 if length == 1 else 16)
    for dtype in ("float32", "bfloat16")
    for d_inner, length in (SCAN_STAGES | SCAN_RAGGED).values()
]


def shapes(dtype, d_inner, length, d_state, batch=2) -> ScanInputs:
    def array(*shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(kind))

    f32 = jnp.dtype("float32")
    return ScanInputs(
        x=array(batch, length, d_inner),
        dt=array(batch, length, d_inner),
        A=array(d_inner, d_state, kind=f32),
        B=array(batch, length, d_state),
        C=array(batch, length, d_state),
        D=array(d_inner, kind=f32),
        z=array(batch, length, d_inner),
        dt_bias=array(d_inner, kind=f32),
        initial_state=array(batch, d_inner, d_state, kind=f32),
    )


@contextlib.contextmanager
def time_limit(seconds: float):
    def stop(signum, frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_pallas
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_lowers_for_cuda(variant):
    """The kernels' own lowering, layouts and limits included, needs no GPU."""
    inputs = shapes(*variant)
    with time_limit(60):  # a search for layouts could go on without end
        lowered = jax.jit(both).trace(inputs, inputs.x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 6  # 2 + carry forward, 2 + carry backward


@needs_pallas
def test_lowers_where_numbers_are_64_bits_wide():
    """JAX then counts in 64 bits, which the kernels must not."""
    inputs = shapes("float32", 96, 1025, 16)
    with jax.enable_x64(True):
        lowered = jax.jit(both).trace(inputs, inputs.x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 6


def kernels_in(function, *arguments) -> int:
    """Kernel launches in what is lowered for CUDA."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")


def summed(inputs: ScanInputs):
    y, last = _scan(True, "mosaic_gpu")(inputs)
    return jnp.sum(y) + jnp.sum(last)


@needs_pallas
@pytest.mark.parametrize(
    ("transform", "launches"),
    [(lambda f: f, 3), (jax.grad, 6), (lambda f: jax.grad(jax.checkpoint(f)), 6)],
    ids=["forward", "grad", "remat"],
)
def test_launches_under_transformations(transform, launches):
    """Rematerialised, the forward pass runs again for its residual; the first one's result is the sum alone."""
    assert kernels_in(transform(summed), shapes("float32", 96, 64, 16)) == launches


@needs_pallas
def test_layers_of_one_shape_share_their_kernels():
    """Lowering takes seconds a layer otherwise."""
    assert kernels_in(lambda a, b: summed(a) + summed(b), *[shapes("float32", 96, 64, 16)] * 2) == 3


@needs_pallas
def test_a_mapped_batch_is_one_larger_batch():
    mapped = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), shapes("float32", 96, 64, 16)._asdict()
    )
    mapped |= {k: jax.ShapeDtypeStruct(mapped[k].shape[1:], jnp.float32) for k in ("A", "D", "dt_bias")}
    axes = {k: None if k in ("A", "D", "dt_bias") else 0 for k in mapped}
    assert kernels_in(jax.vmap(lambda i: jax.grad(summed)(ScanInputs(**i)), in_axes=(axes,)), mapped) == 6


HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None


@needs_pallas
@pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's CUDA plugin is not installed, so there is no assembler for sm_90a")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_spills_no_register(dtype, tmp_path):
    """Two blocks of the backward kernel, four of each other one, fit on a multiprocessor."""
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper", dtype]
    env = os.environ | {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = sorted(tmp_path.glob("*.ptxas"))
    assert len(reports) == 6 * len([v for v in VARIANTS if v[0] == dtype])
    resources = sorted(tmp_path.glob("*.resources.txt"))
    assert len(resources) == len(reports)
    large = set()
    for report in reports:
        text = report.read_text()
        assert "0 bytes spill stores, 0 bytes spill loads" in text, text
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        assert registers * 128 * 2 <= 65536, text
        if registers * 128 * 4 > 65536:
            large.add(kernel_of(report))
    for resource in resources:
        shared = int(re.search(r"smem_scratch_bytes=(\d+)", resource.read_text())[1])
        assert shared * 2 <= 227 * 1024
        if shared * 4 > 227 * 1024:
            large.add(kernel_of(resource))
    assert large == {"scan_gradients"}


def kernel_of(path):
    """The kernel's name: dumps number it, or add the digest of its module."""
    return path.name.split(".")[0].rsplit("_", 1)[0]


@pytest.mark.skipif(not OLD, reason="the installed JAX has what the kernel needs")
def test_an_older_jax_says_so_and_takes_xla():
    inputs = scan_inputs(0, 1, 4, 4, 4)
    assert choose_backend(inputs) == "xla"
    with pytest.raises(Unsupported, match=r"needs JAX 0\.11"):
        choose_backend(inputs, "mosaic_gpu")


@needs_pallas
def test_reasons_not_to_use_the_kernel():
    inputs = scan_inputs(0, 1, 4, 4, 4)
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU"):
        choose_backend(inputs, "mosaic_gpu")
    assert choose_backend(inputs) == "xla"
    with interpreted():
        assert choose_backend(inputs) == "mosaic_gpu"
        with pytest.raises(Unsupported, match="d_state is 20"):
            choose_backend(scan_inputs(0, 1, 4, 4, 20), "mosaic_gpu")
        with pytest.raises(Unsupported, match="x is float16"):
            choose_backend(inputs._replace(x=inputs.x.astype(jnp.float16)), "mosaic_gpu")
