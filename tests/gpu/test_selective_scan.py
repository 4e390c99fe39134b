"""The Pallas kernel on a GPU, at the network's sizes and at ragged ones, against a float64 scan of the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mambahome_kernels import choose_backend, selective_scan
from mambahome_kernels.selective_scan.api import ScanInputs
from mambahome_kernels.shapes import SCAN_STAGES

SHARED = ("A", "D", "dt_bias")
STAGES = tuple(SCAN_STAGES.values())


def _why_not() -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"there is no GPU: the default device is {device.platform} (JAX_PLATFORMS=cuda runs these tests)"
    if float(device.compute_capability) < 9:
        return f"the kernel needs compute capability 9.0, this GPU has {device.compute_capability}"
    return None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


def make_inputs(seed, batch, length, d_inner, d_state=16, dtype=jnp.float32, dt_scale=1.0) -> ScanInputs:
    """As a Mamba layer makes them, with a first state besides."""
    rng = np.random.default_rng(seed)
    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), d_inner))

    def normal(*shape, kind=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), kind)

    return ScanInputs(
        x=normal(batch, length, d_inner, kind=dtype),
        dt=normal(batch, length, d_inner, kind=dtype) * dt_scale,
        A=-jnp.tile(jnp.arange(1.0, d_state + 1), (d_inner, 1)),
        B=normal(batch, length, d_state, kind=dtype),
        C=normal(batch, length, d_state, kind=dtype),
        D=normal(d_inner),
        z=normal(batch, length, d_inner, kind=dtype),
        dt_bias=jnp.asarray(np.log(np.expm1(step)), jnp.float32),
        initial_state=normal(batch, d_inner, d_state),
    )


def run(inputs: ScanInputs, dy: jax.Array, dlast: jax.Array, backend: str | None):
    def scan(inputs: ScanInputs):
        return selective_scan(**inputs._asdict(), softplus=True, backend=backend)

    (y, last), vjp = jax.vjp(scan, inputs)
    return y, last, vjp((dy, dlast))[0]


def cotangents(inputs: ScanInputs):
    rng = np.random.default_rng(99)
    dy = jnp.asarray(rng.standard_normal(inputs.x.shape, dtype=np.float32), inputs.x.dtype)
    return dy, jnp.asarray(rng.standard_normal((inputs.x.shape[0], *inputs.A.shape), dtype=np.float32))


def in_float64(inputs: ScanInputs, dy, dlast):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (inputs, dy, dlast))
        return jax.jit(lambda *a: run(*a, "xla"))(*wide)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(inputs: ScanInputs, y_bound: float, gradient_bound: float) -> None:
    dy, dlast = cotangents(inputs)
    y, last, gradients = jax.jit(lambda *a: run(*a, "mosaic_gpu"))(inputs, dy, dlast)
    wanted_y, wanted_last, wanted = in_float64(inputs, dy, dlast)
    errors = {"y": relative(y, wanted_y), "last": relative(last, wanted_last)}
    pairs = zip(ScanInputs._fields, gradients, wanted, strict=True)
    errors |= {f"d{name}": relative(got, exact) for name, got, exact in pairs if got is not None}
    print(inputs.x.shape, inputs.x.dtype, {k: f"{v:.1e}" for k, v in errors.items()})
    assert y.dtype == inputs.x.dtype
    assert errors.pop("y") < y_bound
    assert errors.pop("last") < max(2e-6, gradient_bound / 100)
    assert max(errors.values()) < gradient_bound, errors


@pytest.mark.parametrize(("d_inner", "length"), STAGES)
def test_stages_in_float32(d_inner, length):
    check(make_inputs(0, 2, length, d_inner), 2e-6, 1e-5)


@pytest.mark.parametrize(("d_inner", "length"), STAGES)
def test_stages_in_bfloat16(d_inner, length):
    check(make_inputs(0, 2, length, d_inner, dtype=jnp.bfloat16), 4e-3, 6e-3)


@pytest.mark.parametrize("length", [1, 7, 1023, 1025])
@pytest.mark.parametrize(("batch", "d_inner", "d_state"), [(1, 5, 3), (3, 90, 16), (2, 200, 8)])
def test_ragged_sizes(batch, length, d_inner, d_state):
    check(make_inputs(length, batch, length, d_inner, d_state), 2e-6, 1e-5)


@pytest.mark.parametrize("dt_scale", [30.0, 1e4])
def test_extreme_steps(dt_scale):
    check(make_inputs(3, 2, 500, 96, dt_scale=dt_scale), 2e-6, 1e-5)


def test_the_best_backend_is_the_kernel_under_jit_grad_remat_and_vmap():
    inputs = make_inputs(5, 2, 300, 96)
    assert choose_backend(inputs) == "mosaic_gpu"

    def loss(inputs: ScanInputs, backend):
        y, last = selective_scan(**inputs._asdict(), softplus=True, backend=backend)
        return jnp.sum(jnp.sin(y)) + jnp.sum(last)

    wanted = jax.jit(jax.grad(lambda i: loss(i, "xla")))(inputs)
    remat = jax.jit(jax.grad(jax.checkpoint(lambda i: loss(i, None))))(inputs)
    axes = ScanInputs(**{name: None if name in SHARED else 0 for name in ScanInputs._fields})
    each = ScanInputs(**{k: v if k in SHARED else v[:, None] for k, v in inputs._asdict().items()})
    mapped = jax.jit(jax.vmap(jax.grad(lambda i: loss(i, None)), in_axes=(axes,)))(each)
    for name, got, by_one, exact in zip(ScanInputs._fields, remat, mapped, wanted, strict=True):
        assert relative(got, exact) < 2e-5, name
        assert relative(by_one.sum(0) if name in SHARED else by_one[:, 0], exact) < 2e-5, name


@pytest.mark.skipif(jax.device_count() < 2, reason="there is only one device to split the batch over")
def test_a_sharded_batch_is_not_gathered():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    inputs = make_inputs(6, 4, 300, 96)
    dy, dlast = cotangents(inputs)
    wanted = jax.jit(lambda *a: run(*a, "mosaic_gpu"))(inputs, dy, dlast)

    def place(a, batched):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec("data" if batched else None)))

    split = ScanInputs(**{k: place(v, k not in SHARED) for k, v in inputs._asdict().items()})
    compiled = jax.jit(lambda *a: run(*a, "mosaic_gpu")).lower(split, place(dy, True), place(dlast, True)).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(split, place(dy, True), place(dlast, True))
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)
