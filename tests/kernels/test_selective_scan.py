"""One suite for every backend of the selective scan: goldens, definition, gradients, transformations, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from mambahome_kernels import Unsupported, choose_backend, selective_scan
from mambahome_kernels.selective_scan import xla
from mambahome_kernels.selective_scan.api import ScanInputs

from tests.conftest import load_golden

BACKENDS = ("reference", "xla")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
OFFICIAL = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BY_TIME = {"x", "dt", "z", "B", "C"}


def _golden(case: str, dtype):
    data = load_golden("layers_tiny.npz")
    arrays = {ours: data[f"{case}/{theirs}"] for ours, theirs in zip(NAMES, OFFICIAL, strict=True)}
    inputs = {k: jnp.asarray(np.swapaxes(v, 1, 2) if k in BY_TIME else v, dtype) for k, v in arrays.items()}
    gradients = {ours: data[f"{case}/grad/{theirs}"] for ours, theirs in zip(NAMES, OFFICIAL, strict=True)}
    gradients = {k: np.swapaxes(v, 1, 2) if k in BY_TIME else v for k, v in gradients.items()}
    return data, inputs, gradients


def _relative(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["scan77", "scan513"])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 5e-6), (jnp.float64, 1e-12)])
def test_golden(backend, case, dtype, bound, x64):
    data, inputs, gradients = _golden(case, dtype)
    R = jnp.asarray(np.swapaxes(data[f"{case}/R"], 1, 2), dtype)

    def loss(inputs):
        y, last = selective_scan(**inputs, softplus=True, backend=backend)
        return jnp.sum(y * R), (y, last)

    got, (y, last) = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert y.dtype == dtype
    assert _relative(y, np.swapaxes(data[f"{case}/out"], 1, 2)) < bound
    assert _relative(last, data[f"{case}/last_state"]) < bound
    for name in NAMES:
        assert _relative(got[name], gradients[name]) < bound, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_without_extras(backend, x64):
    data, inputs, _ = _golden("scan77", jnp.float64)
    args = {k: inputs[k] for k in ("x", "A", "B", "C")}
    y, _ = selective_scan(**args, dt=jax.nn.softplus(inputs["dt"] - 2.5), backend=backend)
    assert _relative(y, np.swapaxes(data["scan77/out_no_z_no_D_no_bias_no_softplus"], 1, 2)) < 1e-12


def _random(seed, batch, length, d_inner, d_state, dtype=np.float64, extras=True):
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.normal(size=(batch, length, d_inner)),
        "dt": rng.normal(size=(batch, length, d_inner)) - 1,
        "A": -np.exp(rng.normal(size=(d_inner, d_state))),
        "B": rng.normal(size=(batch, length, d_state)),
        "C": rng.normal(size=(batch, length, d_state)),
    }
    if extras:
        inputs |= {
            "D": rng.normal(size=d_inner),
            "z": rng.normal(size=(batch, length, d_inner)),
            "dt_bias": rng.normal(size=d_inner),
            "initial_state": rng.normal(size=(batch, d_inner, d_state)),
        }
    return {k: jnp.asarray(v, dtype) for k, v in inputs.items()}


def _value_and_gradients(inputs, softplus, backend):
    weights = np.random.default_rng(9)
    batch, length, d_inner = inputs["x"].shape
    Ry = jnp.asarray(weights.normal(size=(batch, length, d_inner)))
    Rh = jnp.asarray(weights.normal(size=(batch, d_inner, inputs["A"].shape[1])))

    def loss(inputs):
        y, last = selective_scan(**inputs, softplus=softplus, backend=backend)
        return jnp.sum(y * Ry) + jnp.sum(last * Rh), (y, last)

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return outputs, gradients


def _check_xla_is_reference(inputs, softplus):
    if not softplus:
        inputs = inputs | {k: jnp.abs(inputs[k]) * 0.1 for k in ("dt", "dt_bias") if k in inputs}
    expected = _value_and_gradients(inputs, softplus, "reference")
    got = _value_and_gradients(inputs, softplus, "xla")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * float(jnp.abs(b).max()))


SIZES = [(1, 1, 3, 16), (2, 7, 5, 3), (2, 65, 8, 16), (1, 1023, 6, 16), (3, 1025, 4, 5), (1, 2500, 70, 16)]


@pytest.mark.parametrize(
    ("size", "softplus", "extras"),
    [(size, True, True) for size in SIZES]
    + [(size, *flags) for size in SIZES[2:4] for flags in ((True, False), (False, True), (False, False))],
)
def test_xla_is_reference(size, softplus, extras, x64):
    """Every output and gradient, the last and initial state's included, at lengths that fit no chunk.

    size: batch, length, d_inner, d_state.
    """
    _check_xla_is_reference(_random(size[1], *size, extras=extras), softplus)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("narrow", [("dt",), ("x", "dt", "z"), ("B", "C"), ("x", "C")])
def test_inputs_of_several_widths(softplus, narrow):
    """Computed as wide as the state: what is rounded are the inputs, and each result to its own type."""
    wide = _random(3, 2, 70, 5, 16, dtype=np.float32)
    wide |= {k: jnp.abs(wide[k]) * 0.1 for k in ("dt", "dt_bias")}
    inputs = {k: v.astype(jnp.bfloat16) if k in narrow else v for k, v in wide.items()}
    wide = {k: v.astype(jnp.float32) for k, v in inputs.items()}
    (y, last), gradients = _value_and_gradients(inputs, softplus, "xla")
    (exact, exact_last), wanted = _value_and_gradients(wide, softplus, "reference")
    assert y.dtype == inputs["x"].dtype and last.dtype == jnp.float32
    assert _relative(y, np.asarray(exact)) < (1e-2 if "x" in narrow else 1e-5)
    assert _relative(last, np.asarray(exact_last)) < 1e-5
    for name, value in gradients.items():
        assert value.dtype == inputs[name].dtype
        # The gradient of y is rounded to the type of x before it comes back.
        bound = 2e-2 if name in narrow or "x" in narrow else 1e-5
        assert _relative(value, np.asarray(wanted[name])) < bound, name


def test_numbers_that_are_not_floating_are_refused():
    inputs = _random(0, 1, 4, 3, 2, dtype=np.float32)
    for name, kind in (("x", jnp.int32), ("A", jnp.complex64), ("dt", jnp.bool_)):
        with pytest.raises(ValueError, match=f"{name} is {jnp.dtype(kind)}; expected float32"):
            selective_scan(**inputs | {name: inputs[name].astype(kind)})
    with pytest.raises(ValueError, match="A 0 states"):
        no_states = {"A": jnp.zeros((3, 0)), "B": jnp.zeros((1, 4, 0)), "C": jnp.zeros((1, 4, 0))}
        selective_scan(**inputs | no_states | {"initial_state": None})


@pytest.mark.skipif(jax.device_count() < 2, reason="there is only one device to split the batch over")
def test_explicit_and_checked_sharding_are_refused_with_what_to_do():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    inputs = _random(0, 2, 6, 3, 2, dtype=np.float32)
    for kind, message in ((AxisType.Auto, None), (AxisType.Explicit, r"AxisType\.Auto")):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
        split = inputs | {k: jax.device_put(inputs[k], NamedSharding(mesh, PartitionSpec("data"))) for k in BY_TIME}
        if message is None:
            y, _ = jax.jit(lambda inputs: selective_scan(**inputs, backend="xla"))(split)
            assert y.sharding.is_equivalent_to(split["x"].sharding, 3)
        else:
            with pytest.raises(ValueError, match=message):
                jax.jit(lambda inputs: selective_scan(**inputs, backend="xla"))(split)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    by_batch = {k: PartitionSpec("data" if k in BY_TIME or k == "initial_state" else None) for k in inputs}

    def run(check):
        scan = jax.shard_map(
            lambda inputs: selective_scan(**inputs, backend="xla")[0],
            mesh=mesh,
            in_specs=(by_batch,),
            out_specs=PartitionSpec("data"),
            check_vma=check,
        )
        return jax.jit(scan)(inputs)

    np.testing.assert_allclose(run(False), selective_scan(**inputs, backend="reference")[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="check_vma=False"):
        run(True)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_short_sequences_on_a_gpu_are_reference(softplus, extras, x64, monkeypatch):
    monkeypatch.setattr(xla, "is_short", lambda inputs: True)
    inputs = _random(8, 2, 77, 5, 3, extras=extras)
    _check_xla_is_reference(inputs, softplus)
    low = {k: v.astype(jnp.bfloat16 if k in BY_TIME else jnp.float32) for k, v in inputs.items()}
    (y, last), gradients = _value_and_gradients(low, softplus, "xla")
    assert (y.dtype, last.dtype, gradients["B"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_what_is_short(monkeypatch):
    inputs = ScanInputs(**_random(0, 2, 8, 4, 16, np.float32))
    assert not xla.is_short(inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla.is_short(inputs)
    assert not xla.is_short(inputs._replace(x=jax.ShapeDtypeStruct((2, 262144, 96), jnp.float32)))


def test_several_chunks_are_used():
    plan = xla._plan(1, 1025, 6, 16)
    assert plan.chunks > 1
    assert plan.segments > 1
    assert plan.length >= 1025


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_the_forward(backend, x64):
    """Against finite differences, so that the hand-written backward is not only compared with another one."""
    inputs = _random(3, 1, 9, 2, 3)

    def f(*leaves):
        inputs_ = dict(zip(inputs, leaves, strict=True))
        y, last = selective_scan(**inputs_, softplus=True, backend=backend)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last))

    check_grads(f, tuple(inputs.values()), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-120.0, 60.0])
def test_extreme_steps_stay_finite(backend, shift):
    """delta so small that exp(delta A) is 1, or so large that it is 0."""
    inputs = _random(4, 1, 300, 4, 16, np.float32)
    inputs["dt"] = inputs["dt"] + shift
    (y, last), gradients = _value_and_gradients(inputs, True, backend)
    for leaf in jax.tree.leaves((y, last, gradients)):
        assert bool(jnp.isfinite(leaf).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_keep_a_float32_state(backend):
    inputs = _random(5, 2, 400, 8, 16, np.float32)
    low = {k: v.astype(jnp.bfloat16) if k in BY_TIME else v for k, v in inputs.items()}
    exact = {k: v.astype(jnp.float32) for k, v in low.items()}
    y, last = selective_scan(**low, softplus=True, backend=backend)
    y_exact, last_exact = selective_scan(**exact, softplus=True, backend=backend)
    assert y.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert _relative(last, np.asarray(last_exact, np.float64)) < 1e-6
    assert _relative(y.astype(jnp.float32), np.asarray(y_exact, np.float64)) < 4e-3


def test_state_carries_over(x64):
    """Two halves, the second from the first one's last state, are the whole."""
    inputs = _random(6, 2, 600, 4, 16)
    y, last = selective_scan(**inputs, softplus=True)
    halves = [{k: (v[:, s] if k in BY_TIME else v) for k, v in inputs.items()} for s in (slice(250), slice(250, None))]
    y1, middle = selective_scan(**halves[0], softplus=True)
    y2, last2 = selective_scan(**(halves[1] | {"initial_state": middle}), softplus=True)
    np.testing.assert_allclose(jnp.concatenate([y1, y2], 1), y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last2, last, rtol=1e-10, atol=1e-12)


def test_vmap_remat_and_jit():
    inputs = _random(7, 3, 130, 4, 16, np.float32)

    def loss(x, inputs):
        return jnp.sum(selective_scan(**(inputs | {"x": x}), softplus=True)[0] ** 2)

    plain = jax.grad(loss)(inputs["x"], inputs)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(inputs["x"], inputs)
    np.testing.assert_allclose(remat, plain, rtol=2e-5, atol=1e-5)
    batched = ("x", "dt", "z", "B", "C", "initial_state")
    axes = {k: 0 if k in batched else None for k in inputs}
    single = {k: v[:, None] if k in batched else v for k, v in inputs.items()}
    y = jax.vmap(lambda i: selective_scan(**i, softplus=True)[0], in_axes=(axes,))(single)[:, 0]
    np.testing.assert_allclose(y, selective_scan(**inputs, softplus=True)[0], rtol=2e-5, atol=1e-5)


def test_memory_stays_below_twelve_arrays():
    """Inputs, outputs, gradients and scratch of forward + backward together, in arrays of x's size."""
    shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in _random(0, 2, 1, 192, 16, np.float32).items()}
    shapes = {
        k: jax.ShapeDtypeStruct((2, 32768, v.shape[2]), v.dtype) if k in BY_TIME else v for k, v in shapes.items()
    }

    def loss(inputs):
        y, last = selective_scan(**inputs, softplus=True, backend="xla")
        return jnp.sum(y * y) + jnp.sum(last)

    analysis = jax.jit(jax.value_and_grad(loss)).lower(shapes).compile().memory_analysis()
    total = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    assert total < 12 * 2 * 32768 * 192 * 4


def test_errors():
    inputs = _random(8, 1, 4, 2, 3, np.float32)
    with pytest.raises(ValueError, match=r"B is \(1, 4, 2\)"):
        selective_scan(**(inputs | {"B": inputs["B"][..., :2]}))
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        selective_scan(**inputs, backend="cuda")
    with pytest.raises(ValueError, match="length 0"):
        selective_scan(**{k: v[:, :0] if k in BY_TIME else v for k, v in inputs.items()})
    assert choose_backend(ScanInputs(**inputs)) == "xla"
    assert issubclass(Unsupported, ValueError)
