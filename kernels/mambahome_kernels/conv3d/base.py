"""What a backend of the convolution takes and gives, shared by all of them."""

from collections.abc import Callable
from typing import NamedTuple


class Backend(NamedTuple):
    """One way to compute the convolution of x (batch, depth, height, width, inputs) with kernel (3, 3, 3, inputs,
    outputs).

    forward(x, kernel) -> y as x, with `outputs` channels.
    input_gradient(dy, kernel) -> as x. weight_gradient(x, dy) -> as kernel, in the sum's dtype or the kernel's.
    why_not(x, kernel) -> None where all three work, else the reason a user reads.
    """

    forward: Callable
    input_gradient: Callable
    weight_gradient: Callable
    why_not: Callable
