"""Memory of a training step before anything is compiled: an estimate, which training replaces by XLA's own account.

Compiling a step for every candidate of a plan would take minutes. `benchmarks/step_memory.py` compiles the steps of
several plans on a GPU, compares this estimate with XLA's account and the measured peak, and fits the numbers below.
"""

import math
from collections.abc import Sequence

from mambahome_jax.config import ModelConfig, NetworkConfig, Precision

# In bf16, bytes for each element of what grows with the patch, see `step_elements`. Not fitted yet: chosen so that the
# published step of 2 x 128^3 comes to 10.5 GiB with the average of its parameters, where 8.9 were measured without it.
BYTES_AN_ELEMENT = (16.0, 40.0, 12.0)
# Parameters, their gradients, two moments and the moving average, all float32.
_COPIES = 5
# How many times as much as in bf16 activations take, by the peaks of the published step in docs/experiments/speed.md.
_TIMES = {"bf16": 1.0, "tf32": 2.0, "fp32": 2.9}
# Of what JAX may take, a plan fills this part: training compares XLA's account with the device before the first step.
PLANNED_PART = 0.9


def step_elements(network: NetworkConfig, patch: Sequence[int], batch: int) -> tuple[float, float, float]:
    """Count what the memory of a step grows with, on each device.

    Returns: channels of the full grid, channels of all blocks of the encoder, and logits, each times its voxels.
    """
    voxels = batch * math.prod(patch)
    left, blocks = float(voxels), 0.0
    for stride, width, depth in zip(network.strides, network.feat_size, network.depths, strict=True):
        left /= math.prod(stride)
        blocks += left * width * (1 + depth)
    return float(voxels * network.feat_size[0]), blocks, float(voxels * network.out_chans)


def parameters(network: NetworkConfig) -> int:
    """Count the parameters of a network, to a few percent of those of each --model."""
    blocks = [12] * len(network.depths)  # of SegMamba, its MLPs included
    if isinstance(network, ModelConfig):
        experts = zip(network.experts_list, network.experts_list_second, strict=True)
        blocks = [9 + 6 * (first + second) for first, second in experts]
    stages = zip(network.feat_size, network.depths, blocks, strict=True)
    encoder = sum(width**2 * (60 + depth * block) for width, depth, block in stages)
    return encoder + 66 * sum(width**2 for width in (*network.feat_size, network.hidden_size))


def step_gib(network: NetworkConfig, patch: Sequence[int], batch: int, precision: Precision = "bf16") -> float:
    """Estimate the memory in GiB that a training step takes on each device.

    patch: voxels an axis. batch: patches on each device. strides and classes are those of `network`.
    """
    elements = step_elements(network, patch, batch)
    activations = sum(size * count for size, count in zip(BYTES_AN_ELEMENT, elements, strict=True))
    return (4 * _COPIES * parameters(network) + _TIMES[precision] * activations) / 2**30
