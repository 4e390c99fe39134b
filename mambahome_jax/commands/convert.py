"""convert: weights from one form into another."""

from rich.console import Console

from mambahome_jax.flags import ConvertConfig
from mambahome_jax.support.console import command_line, counted, say
from mambahome_jax.support.paths import openable_path
from mambahome_jax.weights.nnunet import nnunet_checkpoints
from mambahome_jax.weights.weights import read_weights, write_folds, write_weights


def run(config: ConvertConfig) -> int:
    """Read SOURCE whole, then write DESTINATION whole; returns 0. Raises CheckpointError and OutputError."""
    folds = {path.parent.name: path for path in nnunet_checkpoints(openable_path(config.source))}
    if len(folds) > 1:
        networks = {name: read_weights(path) for name, path in folds.items()}
        write_folds(config.destination, networks, overwrite=config.overwrite)
        weights = next(iter(networks.values()))
    else:
        weights = read_weights(config.source)
        write_weights(config.destination, weights, overwrite=config.overwrite)
    count = sum(array.size for array in weights.params.values())
    shape = f"{counted(weights.config.in_chans, 'channel')} in, {counted(weights.config.out_chans, 'class')} out"
    console = Console()
    several = f"{len(folds)} networks, each of " if len(folds) > 1 else ""
    say(console, f"{config.destination}: {several}{count:,} parameters, {shape}")
    words = ("--data_path", "SCANS", "--model_path", config.destination, "--output_dir", "PRED")
    say(console, f"Next: {command_line('infer', *words)}")
    return 0
