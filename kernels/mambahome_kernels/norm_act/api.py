"""The public function of norm and activation: picks a backend."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from mambahome_kernels.backends import Backends

BACKENDS = Backends("mambahome_kernels.norm_act", reference="reference", xla="xla")
EPS = 1e-5


Affine = tuple[jax.Array, jax.Array]  # scale and shift of a norm, (channels,) each


class Backend(NamedTuple):
    """norm_act(slope, eps, inputs, plus, affine) -> y, differentiable; affine: empty, or an entry an input."""

    norm_act: Callable
    why_not: Callable = lambda *_: None


def norm_act(
    inputs: tuple[jax.Array, ...],
    plus: jax.Array | None = None,
    affine: tuple[Affine, ...] = (),
    *,
    slope: float,
    eps: float = EPS,
    backend: str | None = None,
) -> jax.Array:
    """Leaky ReLU of the sum of the instance norms of `inputs`, and of `plus` as it is.

    Args:
        inputs, plus: (batch, depth, height, width, channels), all of one shape and dtype.
        affine: scale and shift of each norm, (channels,) floating; empty for 1 and 0.
        slope: of the activation below 0. 0 is the ReLU, 1 no activation.
        eps: added to the variance.
        backend: "reference" (the definition, autodiff), "xla" (keeps its inputs alone for the backward pass), or None
            for the best one here.

    Returns:
        as the inputs in shape and dtype. Statistics, over space for each sample and channel, are float32 at least.

    Raises:
        ValueError: an unknown backend, or scales and shifts for another number of inputs.
    """
    if len(affine) not in (0, len(inputs)):
        raise ValueError(f"affine has {len(affine)} entries for {len(inputs)} inputs; expected one each, or none")
    return BACKENDS[BACKENDS.choose(backend)].norm_act(slope, eps, inputs, plus, affine)
