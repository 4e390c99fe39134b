"""convert: weights from one form into another."""

from rich.console import Console

from mambahome_jax.flags import ConvertConfig
from mambahome_jax.support.console import say
from mambahome_jax.weights.weights import read_weights, write_weights


def run(config: ConvertConfig) -> int:
    """Read SOURCE whole, then write DESTINATION whole; returns 0. Raises CheckpointError and OutputError."""
    weights = read_weights(config.source)
    write_weights(config.destination, weights, overwrite=config.overwrite)
    count = sum(array.size for array in weights.params.values())
    shape = f"{weights.config.in_chans} channels in, {weights.config.out_chans} classes out"
    say(Console(), f"{config.destination}: {count:,} parameters, {shape}")
    return 0
