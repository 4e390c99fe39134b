"""plan: print the settings that follow from a dataset, and what flags change of them."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mambahome_jax.flags import PlanConfig
from mambahome_jax.preprocessing.plan import PLAN, train_words
from mambahome_jax.preprocessing.plan_folder import plan_folder
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.console import command_line, counted, say


def run(config: PlanConfig) -> int:
    """Plan for config.folder; return the exit code. Raises as `plan_folder`."""
    console = Console()
    result = plan_folder(config)
    say(console, f"{config.folder}: {counted(len(result.fingerprint.shapes), 'case')}, for {result.machine}")
    table = Table("setting", "value", "reason")
    before = result.before.settings()
    for name, setting in result.plan.settings().items():
        value, earlier = as_typed(setting.value), as_typed(before[name].value)
        table.add_row(name, value if value == earlier else f"{value} (was {earlier})", escape(setting.reason))
    console.print(table)
    if config.output is not None:
        say(console, f"Wrote {config.output}")
    if result.prepared:
        if config.output is None and result.plan != result.before:
            say(console, f"train follows {config.folder / PLAN}; --output {config.folder / PLAN} replaces it")
        say(console, f"Next: {command_line('train', *train_words(config.folder, result.plan.settings()))}")
        return 0
    if config.output is None and result.plan != result.before:
        say(console, "--output FILE writes this plan, and preprocess --plan FILE obeys it")
    words: list[str | Path] = ["--input_path", config.folder, "--output_path", "READY"]
    words += ["--dataset", *config.dataset] if config.dataset else []
    words += ["--plan", config.output] if config.output is not None else []
    say(console, f"Next: {command_line('preprocess', *words)}")
    return 0
