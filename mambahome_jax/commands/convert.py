"""convert: weights from one form into another."""

from rich.console import Console

from mambahome_jax.flags import ConvertConfig
from mambahome_jax.support.console import command_line, say
from mambahome_jax.weights.weights import read_weights, write_weights


def run(config: ConvertConfig) -> int:
    """Read SOURCE whole, then write DESTINATION whole; returns 0. Raises CheckpointError and OutputError."""
    weights = read_weights(config.source)
    write_weights(config.destination, weights, overwrite=config.overwrite)
    count = sum(array.size for array in weights.params.values())
    shape = f"{weights.config.in_chans} channels in, {weights.config.out_chans} classes out"
    console = Console()
    say(console, f"{config.destination}: {count:,} parameters, {shape}")
    words = ("--data_path", "SCANS", "--model_path", config.destination, "--output_dir", "PRED")
    say(console, f"Next: {command_line('infer', *words)}")
    return 0
