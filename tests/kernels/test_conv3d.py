"""The convolution of few channels: every backend against the definition, and the GPU kernels without a GPU."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mambahome_kernels import Unsupported, conv3d
from mambahome_kernels.conv3d.api import why_not
from mambahome_kernels.shapes import CONV3D

from tests.conftest import ROOT
from tests.kernels.test_mosaic_gpu import kernels_in, needs_pallas, relative

if jax.__version_info__ >= (0, 11):
    from mambahome_kernels.conv3d.mosaic_gpu import backend as mosaic_gpu
    from mambahome_kernels.conv3d.mosaic_gpu.tiles import view_of, walks
    from mambahome_kernels.mosaic import runtime

BF16 = jnp.bfloat16
VARIANTS = list(CONV3D.values())


CUBE, IN_PLANE = (3, 3, 3), (3, 3, 1)


def arrays(shape, outputs, dtype, size=CUBE, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    weights = rng.standard_normal((*size, shape[-1], outputs)) / np.sqrt(np.prod(size) * shape[-1])
    kernel = jnp.asarray(weights, dtype)
    return x, kernel, jnp.asarray(rng.standard_normal((*shape[:-1], outputs)), dtype)


def all_three(x, kernel, dy, backend):
    """The result and both gradients."""
    y, pull = jax.vjp(lambda x, kernel: conv3d(x, kernel, backend=backend), x, kernel)
    return y, *pull(dy)


def on_gpu(x, kernel, dy):
    return all_three(x, kernel, dy, "mosaic_gpu")


def in_float64(x, kernel, dy):
    with jax.enable_x64(True):
        return all_three(*(jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel, dy)), "reference")


def test_reference_is_the_sum_over_taps():
    """By loops over voxels and taps, which share no code with it."""
    x, kernel, _ = (np.asarray(a) for a in arrays((1, 2, 3, 4, 2), 3, jnp.float32))
    expected = np.zeros((1, 2, 3, 4, 3))
    for d, h, w in np.ndindex(2, 3, 4):
        for tap in np.ndindex(3, 3, 3):
            at = np.add((d, h, w), tap) - 1
            if np.all((at >= 0) & (at < (2, 3, 4))):
                expected[0, d, h, w] += x[0, *at] @ kernel[tap]
    np.testing.assert_allclose(conv3d(x, kernel, backend="reference"), expected, atol=1e-6)


def test_gradients_of_the_reference_are_the_derivatives():
    with jax.enable_x64(True):
        x, kernel, dy = arrays((2, 3, 2, 4, 2), 3, jnp.float64)
        _, dx, dkernel = all_three(x, kernel, dy, "reference")
        rng = np.random.default_rng(3)
        vx, vk = (jnp.asarray(rng.standard_normal(a.shape)) for a in (x, kernel))
        step = 1e-5

        def forward(x, kernel):
            return jnp.vdot(conv3d(x, kernel, backend="reference"), dy)

        slope = (forward(x + step * vx, kernel + step * vk) - forward(x - step * vx, kernel - step * vk)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(dx, vx) + jnp.vdot(dkernel, vk), slope, rtol=1e-7)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 8), (1, 1, 3, 2, 3)])
def test_xla_is_the_definition(shape):
    inputs = arrays(shape, 5, jnp.float32)
    for got, expected in zip(all_three(*inputs, "xla"), in_float64(*inputs), strict=True):
        assert got.dtype == jnp.float32
        assert got.shape == expected.shape
        assert relative(got, expected) < 1e-6


@needs_pallas
@pytest.mark.parametrize(
    ("shape", "outputs", "size"),
    [
        ((1, 2, 9, 18, 24), 16, CUBE),
        ((2, 2, 3, 5, 16), 24, CUBE),
        ((1, 3, 64, 3, 24), 16, IN_PLANE),
        ((2, 2, 7, 4, 16), 24, IN_PLANE),
        ((1, 2, 3, 20, 24), 16, (1, 3, 3)),
    ],
    ids=["ragged", "smaller than a tile", "thick slices", "smaller than a square", "slices first"],
)
def test_interpreted_kernels_are_the_definition(capfd, shape, outputs, size):
    inputs = arrays(shape, outputs, BF16, size)
    with runtime.interpreted():
        results = jax.block_until_ready(all_three(*inputs, "mosaic_gpu"))
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    for got, expected in zip(results, in_float64(*inputs), strict=True):
        assert got.dtype == BF16
        assert relative(got, expected) < 3e-3  # rounding to bfloat16


@needs_pallas
def test_interpreted_walks_that_share_a_block(capfd):
    """Runs of two planes, so that a block goes from one walk to the next within a column and between batch entries."""
    x, kernel, dy = arrays((2, 3, 8, 16, 16), 8, BF16)
    with runtime.interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_gpu, "core_count", lambda: 1)
        y = mosaic_gpu.conv3d_forward(x, kernel, run=2)
        dkernel = mosaic_gpu.conv3d_weight_gradient(x, dy, run=2)
    assert "RACE DETECTED" not in capfd.readouterr().out
    expected_y, _, expected = in_float64(x, kernel, dy)
    assert relative(y, expected_y) < 3e-3
    assert dkernel.dtype == jnp.float32
    assert relative(dkernel, expected) < 1e-6


@needs_pallas
def test_interpreted_rows_that_no_tile_divides():
    """Without the search for races: the last squares lie over others, and both write the same."""
    x, kernel, dy = arrays((1, 2, 15, 14, 16), 24, BF16, IN_PLANE)
    with runtime.interpreted(detect_races=False):
        results = all_three(x, kernel, dy, "mosaic_gpu")
    for got, expected in zip(results, in_float64(x, kernel, dy), strict=True):
        assert relative(got, expected) < 3e-3


@needs_pallas
@pytest.mark.parametrize(("shape", "outputs", "size"), VARIANTS, ids=str)
def test_lowers_for_cuda(shape, outputs, size, monkeypatch):
    """The kernels' own lowering, limits of shared memory included, needs no GPU."""
    monkeypatch.setattr(runtime, "default_device", GPU)
    inputs = shapes(shape, outputs, size=size)
    assert why_not(*inputs[:2]) is None
    assert kernels_in(on_gpu, *inputs) == 2 + (outputs != shape[-1])


@needs_pallas
def test_layers_of_one_shape_share_their_kernels(monkeypatch):
    """And the gradient by the input is the forward pass of another kernel."""
    monkeypatch.setattr(runtime, "default_device", GPU)
    x, kernel, _ = shapes((2, 32, 32, 32, 24), 24)

    def loss(x, first, second):
        return jnp.sum(conv3d(conv3d(x, first), second).astype(jnp.float32))

    assert kernels_in(jax.grad(loss, (0, 1, 2)), x, kernel, kernel) == 2


@needs_pallas
def test_a_mapped_batch_is_one_larger_batch(monkeypatch):
    monkeypatch.setattr(runtime, "default_device", GPU)
    x, kernel, _ = shapes((3, 2, 16, 16, 16, 24), 24)
    assert kernels_in(jax.vmap(conv3d, in_axes=(0, None)), x, kernel) == 1


@needs_pallas
def test_a_sharded_batch_stays_where_it_is(monkeypatch):
    """With XLA's convolutions in the place of the kernels, which need a GPU; only the weights' gradient is added up."""

    def by_entry(x, dy, sizes):
        kernel = jnp.zeros((3, 3, 3, x.shape[-1], dy.shape[-1]), jnp.float32)

        def entry(x, dy):
            pull = jax.vjp(lambda kernel: conv3d(x[None].astype(jnp.float32), kernel, backend="reference"), kernel)[1]
            return pull(dy[None].astype(jnp.float32))[0]

        return jax.vmap(entry)(x, dy)

    monkeypatch.setattr(runtime, "default_device", GPU)
    monkeypatch.setattr(mosaic_gpu.forward, "forward", lambda x, kernel, sizes: conv3d(x, kernel, backend="xla"))
    monkeypatch.setattr(mosaic_gpu.weight_gradient, "weight_gradient", by_entry)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, kernel, dy = arrays((4, 2, 3, 4, 8), 8, BF16)
    x, dy = jax.device_put((x, dy), split)
    compiled = jax.jit(on_gpu).lower(x, kernel, dy).compile()
    text = compiled.as_text()
    assert text.count(" all-reduce(") == 1
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    y, dx, dkernel = compiled(x, kernel, dy)
    assert y.sharding.is_equivalent_to(split, 5) and dx.sharding.is_equivalent_to(split, 5)
    for got, expected in zip((y, dx, dkernel), in_float64(x, kernel, dy), strict=True):
        assert relative(got, expected) < 5e-3


class GPU:
    platform = "gpu"
    compute_capability = "9.0"


def shapes(shape, outputs, size=CUBE, dtype=BF16):
    kernel = (*size, shape[-1], outputs)
    return [jax.ShapeDtypeStruct(s, dtype) for s in (shape, kernel, (*shape[:-1], outputs))]


@needs_pallas
@pytest.mark.parametrize(
    ("shape", "outputs", "size", "dtype", "reason"),
    [
        ((1, 8, 8, 8, 48), 48, CUBE, jnp.float32, "float32"),
        ((1, 8, 8, 8, 1), 48, CUBE, BF16, "1 input channels"),
        ((1, 8, 8, 8, 48), 96, CUBE, BF16, "96 output channels"),
        ((1, 8, 8, 8, 64), 64, CUBE, BF16, "shared memory"),
        ((0, 8, 8, 8, 48), 48, CUBE, BF16, "empty"),
        ((8, 1, 8, 8, 48), 48, CUBE, BF16, "one plane"),
        ((1, 8, 9, 16, 16), 8, CUBE, BF16, "rows of 16 voxels"),
        ((1, 8, 9, 20, 8), 16, CUBE, BF16, "rows of 20 voxels"),
        ((1, 8, 8, 8, 48), 8, IN_PLANE, BF16, "8 output channels"),
        ((1, 8, 8, 80, 48), 48, IN_PLANE, BF16, "80 voxels"),
        ((1, 8, 8, 8, 48), 48, (3, 1, 3), BF16, "(3, 1, 3)"),
    ],
)
def test_reasons_not_to_use_the_kernels(shape, outputs, size, dtype, reason, monkeypatch):
    monkeypatch.setattr(runtime, "default_device", GPU)
    x, kernel, _ = shapes(shape, outputs, size, dtype)
    assert reason in why_not(x, kernel)


@needs_pallas
def test_devices_without_these_instructions(monkeypatch):
    x, kernel, _ = shapes((1, 8, 8, 8, 48), 48)
    assert "needs an NVIDIA GPU" in why_not(x, kernel)
    for capability in ("8.0", "10.0"):
        monkeypatch.setattr(GPU, "compute_capability", capability)
        monkeypatch.setattr(runtime, "default_device", GPU)
        assert capability in why_not(x, kernel)


@needs_pallas
def test_a_newer_jax_without_its_parts(monkeypatch):
    x, kernel, _ = shapes((1, 8, 8, 8, 48), 48)
    monkeypatch.setitem(sys.modules, "mambahome_kernels.conv3d.mosaic_gpu.backend", None)
    assert "lacks what it is written in" in why_not(x, kernel)


def test_arguments_that_do_not_fit():
    x, kernel, _ = arrays((1, 2, 2, 2, 4), 3, jnp.float32)
    with pytest.raises(ValueError, match=r"expected \(3, 3, 3, 4, outputs\)"):
        conv3d(x, kernel[..., :2, :])
    with pytest.raises(ValueError, match="expected one dtype"):
        conv3d(x, kernel.astype(BF16))
    with pytest.raises(ValueError, match="expected one of reference, xla, mosaic_gpu"):
        conv3d(x, kernel, backend="cudnn")
    with pytest.raises(Unsupported, match="cannot run here"):
        conv3d(x, kernel, backend="mosaic_gpu")


@needs_pallas
def test_no_row_of_the_result_is_as_wide_as_a_square():
    """On a GPU Pallas would store such a square as one run of bytes, over its neighbours (seen with JAX 0.11.2)."""

    def row_width(size, width):
        view = view_of(size, (5, 8, width))
        return mosaic_gpu.forward.sizes_of(view, (1, 5, 8, width, 16), 64, 1).row_width

    assert [row_width(CUBE, width) for width in (4, 8, 16)] == [4, 9, 16]
    assert [row_width(IN_PLANE, width) for width in (7, 8, 9)] == [64, 64, 72]


@needs_pallas
@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("shape", [(2, 128, 128, 128), (1, 5, 9, 17), (3, 1, 40, 8)])
def test_every_voxel_is_in_one_walk(shape, blocks):
    w = walks(shape, 8, 16, blocks)
    seen = np.zeros((shape[0], w.grid[1] * w.run, w.grid[2] * 8, w.grid[3] * 16), int)
    for block in range(w.blocks):
        for walk in range(int(w.all_steps(jnp.int32(block))) // w.steps):
            at = [int(i) for i in w.place(jnp.int32(walk * w.steps), jnp.int32(block))]
            seen[at[0], at[1] : at[1] + w.run, at[2] : at[2] + 8, at[3] : at[3] + 16] += 1
    assert (seen == 1).all()


@needs_pallas
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin is not installed, so there is no assembler for sm_90a",
)
def test_machine_code_spills_no_register(tmp_path):
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper", "conv3d"]
    env = os.environ | {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == sum(2 + (outputs != shape[-1]) for shape, outputs, _ in VARIANTS)
    for text in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in text, text
        assert "serialized" not in text, text
        assert int(re.search(r"Used (\d+) registers", text)[1]) <= 168, text


@needs_pallas
def test_operations_are_counted(monkeypatch):
    monkeypatch.setattr(runtime, "default_device", GPU)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    matrix_flops = importlib.import_module("flops").matrix_flops
    for size, taps in ((CUBE, 27), (IN_PLANE, 9)):
        traced = jax.jit(on_gpu).trace(*shapes((2, 3, 4, 5, 16), 24, size))
        assert matrix_flops(traced.jaxpr) == 3 * 2 * (2 * 3 * 4 * 5) * taps * 16 * 24
