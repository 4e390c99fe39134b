"""convert: weights from one form into another."""

from rich.console import Console

from mambahome_jax.flags import ConvertConfig
from mambahome_jax.weights.weights import read_weights, write_weights


def run(config: ConvertConfig) -> int:
    """Read SOURCE whole, then write DESTINATION whole; returns 0.

    Raises CheckpointError (nothing is written) and OutputError.
    """
    weights = read_weights(config.source)
    write_weights(config.destination, weights, overwrite=config.overwrite)
    count = sum(array.size for array in weights.params.values())
    Console(highlight=False, soft_wrap=True).print(
        f"{config.destination}: {count:,} parameters, {weights.config.in_chans} channels in, "
        f"{weights.config.out_chans} classes out",
        markup=False,
    )
    return 0
