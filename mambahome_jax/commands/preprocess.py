"""preprocess: a folder of scans becomes resampled NIfTI files and the patch store that training reads."""

from functools import partial

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.preprocessing.dataset import Preprocessed, preprocess_folders
from mambahome_jax.preprocessing.plan import PLAN, train_words
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.console import command_line, counted, say, tracked

_SHOWN = 20  # structures that a table lists


def run(config: PreprocessConfig) -> int:
    """Preprocess config.input_path into config.output_path; returns the exit code. Raises as `preprocess_folders`."""
    console = Console()
    result = preprocess_folders(config, partial(say, console), tracked(console, "Preprocessing"))
    prepared, entries = result.prepared, result.entries
    table = Table(title=f"{escape(prepared.name)} in {escape(str(prepared.root))}", show_header=False)
    table.add_row("cases", f"{len(result.done)} done, {len(result.kept)} kept, {len(result.failed)} failed")
    if entries:
        table.add_row("labelled", f"{sum(entry.class_counts is not None for entry in entries)}")
        table.add_row("orientation", prepared.orientation)
        table.add_row("spacing, mm", _range(np.array([entry.spacing for entry in entries]), "{:.4g}"))
        table.add_row("shape", _range(np.array([entry.shape for entry in entries]), "{}"))
        _add_labels(table, result)
    console.print(table)
    if result.failed:
        say(
            console, f"{counted(len(result.failed), 'case')} failed, for the reasons above; dataset.json lists them too"
        )
    if result.plan is not None:
        plan = {name: as_typed(setting.value) for name, setting in result.plan.settings().items()}
        text = f"{plan['model']}, recipe {plan['recipe']}, patch {plan['patch_size']}, batch {plan['batch_size']}, "
        text += plan["length"]
        say(console, f"Plan: {text}; the reasons are in {prepared.root / PLAN}, which you may edit")
    if entries:
        words = train_words(prepared.root, result.plan.settings()) if result.plan else ["--data_train", prepared.root]
        say(console, f"Next: {command_line('train', *words)}")
    return result.exit_code


def _add_labels(table: Table, result: Preprocessed) -> None:
    labels = result.prepared.labels
    counts = [entry.class_counts for entry in result.entries if entry.class_counts is not None]
    voxels = sum(sum(count.values()) for count in counts)
    for value, name in labels.items() if len(labels) <= _SHOWN else ():
        share = 100 * sum(count.get(value, 0) for count in counts) / max(voxels, 1)
        present = sum(value in count for count in counts)
        table.add_row(f"label {value}", f"{escape(name)}: {share:.3g} % of voxels, in {counted(present, 'case')}")


def _range(values: np.ndarray, form: str) -> str:
    lows, highs = ([form.format(value) for value in end(axis=0)] for end in (values.min, values.max))
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in zip(lows, highs, strict=True))
