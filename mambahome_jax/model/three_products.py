"""float32 convolutions on a GPU's tensor cores, which take TF32 operands: three products of halves instead of one.

An operand is split into the bits that TF32 holds and the rest, so a b = ah bh + ah bl + al bh but for al bl, 2^-22 of
it: float32's own rounding is 2^-24, and the sum of many products loses more than either.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Product = Callable[[jax.Array, jax.Array], jax.Array]

_KEPT_BITS = np.uint32(0xFFFFE000)  # sign, exponent and the ten bits of TF32's mantissa


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 array as (high, low), whose sum it is; `high` is exact in TF32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & _KEPT_BITS
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def three_products(product: Product, a: jax.Array, b: jax.Array) -> jax.Array:
    """product(a, b), a bilinear function of float32 arrays that rounds its operands to TF32, nearly as in float32."""
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product(a_high, b_low) + product(a_low, b_high) + product(a_high, b_high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_float32(product: Product, a: jax.Array, b: jax.Array) -> jax.Array:
    """`three_products` whose gradients are made of three products each, too."""
    return three_products(product, a, b)


def _forward(product: Product, a: jax.Array, b: jax.Array):
    return three_products(product, a, b), (a, b)


def _backward(product: Product, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    a, b = saved

    def to_a(cotangent: jax.Array, b: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda a: product(a, b), a)(cotangent)[0]

    def to_b(cotangent: jax.Array, a: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda b: product(a, b), b)(cotangent)[0]

    return three_products(to_a, cotangent, b), three_products(to_b, cotangent, a)


in_float32.defvjp(_forward, _backward)
