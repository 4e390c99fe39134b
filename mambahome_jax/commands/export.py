"""export: a model as one file for deployment."""

from functools import partial

from rich.console import Console

from mambahome_jax.config import spaced
from mambahome_jax.flags import ExportConfig
from mambahome_jax.support.console import command_line, counted, say, tracked
from mambahome_jax.weights.export import export_model


def run(config: ExportConfig) -> int:
    """Write the file; returns 0. Raises CheckpointError, ConfigError and OutputError."""
    console = Console()
    result = export_model(config, partial(say, console), tracked(console, "Lowering"))
    for platform, scan in result.scans.items():
        say(console, f"{platform}: {scan}")
    networks = counted(result.networks, "network")
    size = f"{result.path.stat().st_size / 1e6:.2f} MB"
    say(console, f"{result.path}: {networks}, windows of {spaced(result.window)} voxels, {size}")
    words = ("--data_path", "SCANS", "--model_path", result.path, "--output_dir", "PRED")
    say(console, f"Next: {command_line('infer', *words)}")
    return 0
