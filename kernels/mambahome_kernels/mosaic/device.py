"""The device that kernels are chosen for, and their tracing."""

from collections.abc import Callable

import jax

from mambahome_kernels.mosaic.interpret import interpreting

_CORES = 132  # of an H100 and an H200


def default_device() -> jax.Device:
    """That of jax.default_device, else the first."""
    chosen = getattr(jax.config, "jax_default_device", None)
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]


def core_count() -> int:
    """Multiprocessors of that device."""
    return getattr(default_device(), "core_count", None) or _CORES


def traced_once(*static: str) -> Callable:
    """For each shape, whatever the number of layers: tracing and lowering the kernels takes seconds."""

    def decorate(function: Callable) -> Callable:
        jitted = jax.jit(function, static_argnames=static)

        def call(*args, **kwargs):
            # The kernels count in 32 bits. What the interpreter traces must not be taken for the kernel, or the other
            # way round.
            with jax.enable_x64(False):
                return (function if interpreting() else jitted)(*args, **kwargs)

        return call

    return decorate
