"""Floating-point operations of a traced function: those of its convolutions and matrix products, as defined, our
own kernels for convolutions included.

XLA's own count is no help on a GPU, where cuDNN and cuBLAS are calls that it does not look into. Padding counts, as on
the hardware; what else is computed (norms, activations, the selective scan) does not.
"""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Dense, by the vendor's data sheets. fp32: convolutions are three products of TF32 each (conv3d/xla.py of the kernels).
_HOPPER = {"bf16": 989, "tf32": 495, "fp32": 495}
PEAK_TFLOPS = {"H200": _HOPPER, "H100": _HOPPER}


def peak_tflops(precision: str) -> float:
    """Of the first device; nan where it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peaks[precision] for name, peaks in PEAK_TFLOPS.items() if name in kind), float("nan"))


def matrix_flops(jaxpr: Any) -> float:
    """Two for each multiplication and addition.

    A loop counts as often as it runs, once where its length depends on values; of the branches of a cond the largest.
    """
    return sum(map(_equation_flops, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _equation_flops(equation: Any) -> float:
    parameters = equation.params
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = parameters["dimension_numbers"].rhs_spec[0]
        products = math.prod(kernel) / kernel[outputs]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * products
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "cond":
        return max(map(matrix_flops, parameters["branches"]))
    if parameters.get("name") in ("conv3d_forward", "conv3d_weight_gradient"):
        left, right = (v.aval.shape for v in equation.invars)
        products = math.prod(right[:-1]) if parameters["name"] == "conv3d_forward" else math.prod(left[:-1])
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * products
    times = parameters.get("length", 1) if equation.primitive.name == "scan" else 1
    return times * sum(map(matrix_flops, _inner(parameters.values())))


def _inner(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _inner(value)
    return found
