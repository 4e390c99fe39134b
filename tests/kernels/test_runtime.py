"""How the Pallas kernels are named and compiled, without a GPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from mambahome_kernels import conv3d

if jax.__version_info__ < (0, 11):
    pytest.skip(f"the kernels need JAX 0.11; this is {jax.__version__}", allow_module_level=True)

from mambahome_kernels.mosaic import runtime

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

    monkeypatch.setattr(runtime, "default_device", Device)
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
