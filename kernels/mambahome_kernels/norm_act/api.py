"""The public function of norm and activation: picks a backend."""

from collections.abc import Callable

import jax

from mambahome_kernels.norm_act import reference, xla

BACKENDS: dict[str, Callable[..., jax.Array]] = {"reference": reference.norm_act, "xla": xla.norm_act}
EPS = 1e-5


def norm_act(
    inputs: tuple[jax.Array, ...],
    plus: jax.Array | None = None,
    *,
    slope: float,
    eps: float = EPS,
    backend: str | None = None,
) -> jax.Array:
    """Leaky ReLU of the sum of the instance norms of `inputs`, and of `plus` as it is.

    Args:
        inputs, plus: (batch, depth, height, width, channels), all of one shape and dtype.
        slope: of the activation below 0. 0 is the ReLU, 1 no activation.
        eps: added to the variance.
        backend: "reference" (the definition, autodiff), "xla" (keeps its inputs alone for the backward pass), or None
            for the best one here.

    Returns:
        as the inputs in shape and dtype. Statistics, over space for each sample and channel, are float32 at least.

    Raises:
        ValueError: an unknown backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}, or None for the best")
    return BACKENDS[backend or "xla"](slope, eps, inputs, plus)
