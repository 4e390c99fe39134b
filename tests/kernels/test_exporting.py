"""Programs that are exported: for a platform that is not here, and for any batch."""

import jax
import jax.export
import numpy as np
import pytest
from mambahome_kernels import Unsupported, selective_scan
from mambahome_kernels.backends import exporting, planned_batch, platform, why_not_exported

PLANNED = 4


def test_only_within_is_there_another_platform():
    with exporting("gpu", PLANNED):
        assert platform() == "gpu" and planned_batch(3) == 3
    assert platform() == "cpu" and why_not_exported() is None


@pytest.mark.parametrize(("name", "reason"), [("cpu", "program is for a cpu"), ("gpu", "takes any batch on any GPU")])
def test_a_named_kernel_says_why_it_is_in_no_program(name, reason):
    x = np.zeros((1, 8, 4), np.float32)
    with exporting(name, PLANNED), pytest.raises(Unsupported, match=reason):
        selective_scan(x, x, -np.ones((4, 2), np.float32), x[..., :2], x[..., :2], backend="mosaic_gpu")


def test_the_batch_that_is_planned_for_gives_equal_bits():
    """Long enough for several chunks, whose number goes by the batch."""
    rng = np.random.default_rng(0)
    (batch,) = jax.export.symbolic_shape("batch")
    sizes = {"x": (512, 24), "dt": (512, 24), "B": (512, 16), "C": (512, 16)}
    A = -rng.uniform(0.1, 1, (24, 16)).astype(np.float32)

    def scan(arrays):
        return selective_scan(**arrays, A=A, softplus=True)

    symbolic = {name: jax.ShapeDtypeStruct((batch, *size), np.float32) for name, size in sizes.items()}
    with exporting("cpu", PLANNED):
        exported = jax.export.export(jax.jit(scan), platforms=["cpu"])(symbolic)
    for count in (PLANNED, 1):
        arrays = {name: rng.normal(size=(count, *size)).astype(np.float32) for name, size in sizes.items()}
        for one, other in zip(jax.jit(scan)(arrays), exported.call(arrays), strict=True):
            np.testing.assert_allclose(one, other, atol=0 if count == PLANNED else 1e-4)
