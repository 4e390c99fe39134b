"""Memory of a training step before anything is compiled: an estimate, which training replaces by XLA's own account.

Compiling a step for every candidate of a plan would take minutes. `benchmarks/step_memory.py` compiles the steps of
several plans on a GPU, compares this estimate with XLA's account and the measured peak, and fits the numbers below.
"""

import itertools
import math
from collections.abc import Sequence

from mambahome_jax.config import FourStageConfig, ModelConfig, NetworkConfig, Precision, ResEncUNetConfig, UNetConfig

# In bf16, fitted to XLA's account of eight steps on an H200 (JAX 0.11.2): within 6 % of each. Bytes for each parameter
# with gradient, moments and average; for each element of `step_elements`; and for what every step takes.
_BYTES_A_PARAMETER = 10.9
_BYTES_AN_ELEMENT = (25.8, 29.5)
# Of the latter, those of Mamba's layer; this and the next two by steps of the duels (docs/experiments/duels.md), within
# 4 % of each.
_BYTES_OF_MAMBA = 11.0
_BYTES = 72e6
_BYTES_AN_ELEMENT_OF_SEGMAMBA = (28.7, 41.3)
# Of a U-Net, for each output of a convolution.
_BYTES_AN_OUTPUT = 3.15
# How many times as much as in bf16 activations take, by the peaks of the published step in docs/experiments/speed.md.
_TIMES = {"bf16": 1.0, "tf32": 2.0, "fp32": 2.9}
# Of what JAX may take, a plan fills this part: training compares XLA's account with the device before the first step.
PLANNED_PART = 0.9


def step_elements(network: FourStageConfig, patch: Sequence[int], batch: int) -> tuple[float, float]:
    """Count what the memory of a step grows with, on each device.

    Returns: channels of the full grid, and channels of all blocks of the encoder, each times its voxels. Logits made
    no difference from 3 to 16 classes.
    """
    voxels = batch * math.prod(patch)
    left, blocks = float(voxels), 0.0
    for stride, width, depth in zip(network.strides, network.feat_size, network.depths, strict=True):
        left /= math.prod(stride)
        blocks += left * width * (1 + depth)
    return float(voxels * network.feat_size[0]), blocks


def conv_outputs(network: UNetConfig, patch: Sequence[int]) -> int:
    """Count the values that all convolutions put out for one patch, as nnU-Net's planner does.

    It counts a convolution in every skip of a residual stage, though there is none where the channels stay.
    """
    size, voxels = list(patch), [math.prod(patch)]
    for stride in network.strides:
        size = [n // step for n, step in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    residual = isinstance(network, ResEncUNetConfig)
    counts = [2 * depth + 1 if residual else depth for depth in network.depths]
    # The decoder has none on the coarsest grid.
    decoder = (*(1 + depth for depth in network.decoder_depths[::-1]), 0)
    grids = zip(counts, decoder, network.feat_size, voxels, strict=True)
    return network.out_chans * voxels[0] + sum((count + up) * width * n for count, up, width, n in grids)


def _unet_parameters(network: UNetConfig) -> int:
    """Count those of the convolutions."""
    widths, taps = network.feat_size, list(map(math.prod, network.kernel_sizes))
    inputs, convolutions = (network.in_chans, *widths[:-1]), network.depths
    total = 0
    if isinstance(network, ResEncUNetConfig):
        total = network.in_chans * widths[0] * taps[0]
        total += sum(a * b for a, b in itertools.pairwise(widths) if a != b)
        inputs, convolutions = (widths[0], *widths[:-1]), tuple(2 * depth for depth in network.depths)
    for count, before, width, tap in zip(convolutions, inputs, widths, taps, strict=True):
        total += tap * width * (before + (count - 1) * width)
    steps = zip(network.decoder_depths[::-1], itertools.pairwise(widths), network.strides, taps[:-1], strict=True)
    return total + sum(
        coarse * width * math.prod(stride) + (count + 1) * tap * width**2
        for count, (width, coarse), stride, tap in steps
    )


def parameters(network: NetworkConfig) -> int:
    """Count the parameters of a network, to a few percent of those of each --model."""
    if isinstance(network, UNetConfig):
        return _unet_parameters(network)
    assert isinstance(network, FourStageConfig)
    blocks = [12] * len(network.depths)  # of SegMamba, its MLPs included
    if isinstance(network, ModelConfig):
        experts = zip(network.experts_list, network.experts_list_second, strict=True)
        blocks = [9 + 6 * (first + second) for first, second in experts]
    stages = zip(network.feat_size, network.depths, blocks, strict=True)
    encoder = sum(width**2 * (60 + depth * block) for width, depth, block in stages)
    return encoder + 66 * sum(width**2 for width in (*network.feat_size, network.hidden_size))


def step_gib(network: NetworkConfig, patch: Sequence[int], batch: int, precision: Precision = "bf16") -> float:
    """Estimate the memory in GiB that a training step takes on each device.

    patch: voxels an axis. batch: patches on each device.
    """
    if isinstance(network, UNetConfig):
        activations = _BYTES_AN_OUTPUT * batch * conv_outputs(network, patch)
    else:
        assert isinstance(network, FourStageConfig)
        elements = step_elements(network, patch, batch)
        each = _BYTES_AN_ELEMENT if isinstance(network, ModelConfig) else _BYTES_AN_ELEMENT_OF_SEGMAMBA
        activations = sum(size * count for size, count in zip(each, elements, strict=True))
        if isinstance(network, ModelConfig) and network.mixer == "none":
            activations -= _BYTES_OF_MAMBA * elements[1]
    return (_BYTES + _BYTES_A_PARAMETER * parameters(network) + _TIMES[precision] * activations) / 2**30
