"""What a person sees of a training on the terminal: progress bar or lines, and how a run begins and ends."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from mambahome_jax.datasets.files import listed
from mambahome_jax.datasets.patients import split_notes
from mambahome_jax.datasets.splits import outside_note, outside_split
from mambahome_jax.datasets.structures import describe_numbering
from mambahome_jax.flags import TrainConfig
from mambahome_jax.support.console import CellLine, bars, command_line, counted, duration, say
from mambahome_jax.training.callbacks import Callback
from mambahome_jax.training.schedule import Schedule
from mambahome_jax.training.setup import Setup
from mambahome_jax.training.validation import Validation

# Of a bar, what is left out first where the terminal is narrow; step and loss stay.
_LEFT_OUT = ("data wait", "lr", "images/s", "GPU")
# Columns for what is being done, for the bar itself, and for times and gaps beside it.
_DOING, _BAR, _TIMES = len("Validating"), 10, 28
# Without a terminal: a line after this many seconds.
LINE_SECONDS = 10.0


class Display(Callback):
    """Progress of a training on the terminal; plain lines from time to time where it is not one."""

    def __init__(self, console: Console, schedule: Schedule, start: int = 0, images_per_step: int = 1):
        self.console, self.schedule, self.start, self.images = console, schedule, start, images_per_step
        self._step, self._rate, self._ends = start, 0.0, math.nan
        self._times: deque[float] = deque(maxlen=32)
        self._line_due = 0.0
        self._bar: Progress | None = None
        self._cell = CellLine(console)
        self._before: Mapping[str, float] | None = None

    def __enter__(self) -> "Display":
        self._expect(self.start, validated=True)
        if self.console.is_terminal:
            doing, values = (TextColumn(f"{{task.{name}}}") for name in ("description", "fields[values]"))
            columns = (doing, BarColumn(bar_width=None), values, _Times(self.seconds_left))
            self._bar = bars(self.console, *columns, transient=True)
            done, total = self.schedule.done(self.start)
            self._task = self._bar.add_task(f"{'Starting':<{_DOING}}", total=total, values="")
            self._bar.update(self._task, completed=done)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._cell.__exit__()

    def say(self, text: str) -> None:
        """Print lines above the progress."""
        say(self.console, text)

    def state(self, doing: str, values: str | None = None) -> None:
        """Say beside the bar what is being done, and how far it is where no step tells."""
        if self._bar is not None:
            values = self._bar.tasks[self._task].fields["values"] if values is None else values
            self._bar.update(self._task, description=f"{doing:<{_DOING}}", values=values, refresh=True)

    def seconds_left(self) -> float:
        """Time until the end of the run as last expected; nan where it is not known, or over."""
        left = self._ends - time.monotonic()
        return left if left >= 0 else math.nan

    def tick(self, step: int) -> float | None:
        """Note that a step has ended now; return images per second over the last ones, None before that is known."""
        self._expect(step, validated=False)
        self._times.append(time.perf_counter())
        if len(self._times) < 2:
            return None
        rate = (len(self._times) - 1) / (self._times[-1] - self._times[0]) * self.images
        # The first step compiles; the second and third say how long the rest takes.
        total = self.schedule.total_steps
        if step - self.start == 4 and total is not None and step < total and math.isfinite(self.seconds_left()):
            left = duration(self.seconds_left())
            self.say(f"{rate:.2g} images/s: about {left} left, validations and held-out scores included")
        return rate

    def pause(self) -> None:
        """Leave what came before (validation) out of the time of steps."""
        self._times.clear()
        self._expect(self._step, validated=True)

    def _expect(self, step: int, validated: bool) -> None:
        left = self.schedule.seconds_left(step, validated)
        self._step, self._ends = step, math.nan if left is None else time.monotonic() + left

    def validation(self, step: int, validation: Validation) -> None:
        """Say the scores."""
        text = f"step {step}: validation Dice {validation.dice:.4f} in {duration(validation.seconds)}"
        self.say(f"{text}\n{dice_table(validation.structures, self._before)}")
        self._before = validation.structures

    def step(self, row: Mapping[str, Any]) -> None:
        """Show how far the training is."""
        step, total = row["step"], self.schedule.total_steps
        parts = [f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"]
        parts += [f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}"]
        # After a validation none is known for a step, and the bar would jump.
        self._rate = row["images_per_second"] or self._rate
        if self._rate:
            parts.append(f"{self._rate:.3g} images/s")
        if memory := device_memory(jax.local_devices()):
            parts.append(f"GPU {memory[0] / 2**30:.1f}/{memory[1] / 2**30:.0f} GiB")
        parts.append(f"data wait {row['data_wait']:.0%}")
        if self._bar is not None:
            values = fit_values(parts, self.console.width - _DOING - _TIMES - _BAR)
            # Drawn ten times a second, not with each step.
            done = self.schedule.done(step)[0]
            self._bar.update(self._task, completed=done, description=f"{'Training':<{_DOING}}", values=values)
            return
        if self._cell.on:
            self._cell.show("  ".join(parts))
            return
        now = time.perf_counter()
        if now >= self._line_due or step == total:
            self._line_due = now + LINE_SECONDS
            if math.isfinite(self.seconds_left()):
                parts.append(f"left {duration(self.seconds_left())}")
            self.say("  ".join(parts))


class _Times(ProgressColumn):
    """The time since the start, and what `left` gives."""

    def __init__(self, left: Callable[[], float]):
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        left, elapsed = self._left(), timedelta(seconds=int(task.elapsed or 0))
        return Text(f"{elapsed} left {duration(left) if math.isfinite(left) else '-':<10}")


def fit_values(parts: Sequence[str], width: int) -> str:
    """Join what a bar says of a step; where that is too wide, without what matters least."""
    kept = list(parts)
    for name in _LEFT_OUT:
        if len("  ".join(kept)) > width:
            kept = [part for part in kept if name not in part]
    return "  ".join(kept)


def device_memory(devices: Sequence[jax.Device]) -> tuple[int, int] | None:
    """(largest use so far, limit) in bytes of the fullest device, None where they do not tell (CPUs)."""
    stats = [stats for device in devices if (stats := device.memory_stats())]
    pairs = [(s["peak_bytes_in_use"], s["bytes_limit"]) for s in stats if {"peak_bytes_in_use", "bytes_limit"} <= {*s}]
    return max(pairs) if pairs else None


def dice_table(structures: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """A line a structure: name, Dice, and the change since `before`; nan where no case had the structure."""
    width = max((len(name) for name in structures), default=0)
    lines = []
    for name, value in structures.items():
        change = value - (before or {}).get(name, math.nan)
        lines.append(f"  {name:<{width}}  {value:.3f}" + (f"  {change:+.3f}" if math.isfinite(change) else ""))
    return "\n".join(lines)


def start_lines(
    setup: Setup, schedule: Schedule, parameters: int, devices: Sequence[jax.Device], checkpoint: Mapping | None
) -> list[str]:
    """Say what is about to be trained, on what and for how long. checkpoint: config.json of the one gone on from."""
    patch = " x ".join(map(str, setup.patch_size))
    held_out = f"{len(setup.val_cases)} to validate on" if setup.val_cases else "none to validate on"
    names = ", ".join(setup.structures.values())
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    cases = counted(len(setup.train_cases), "case")
    return [
        f"{setup.prepared.name}: {cases} to train on, {held_out}; {setup.properties.modality}",
        f"{setup.model.out_chans} classes: background, {names}",
        *label_lines(setup),
        f"{parameters / 1e6:.2f} M parameters; patches of {patch}, {setup.global_batch} a step, {setup.precision}, "
        f"on {len(devices)} x {devices[0].device_kind}{processes}",
        str(schedule),
        f"recipe {setup.flags.recipe}: {_recipe_text(setup)}",
        *setup.mirror_lines,
        *_patient_lines(setup),
        *(f"Note: {note}" for note in data_notes(setup)),
        *([f"Resuming after step {checkpoint['step']}"] if checkpoint else []),
    ]


def _recipe_text(setup: Setup) -> str:
    used, optimizer = setup.recipe.ingredients(), setup.schedule.optimizer
    parts = [f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}"]
    if optimizer.name != "SGD":
        parts.append(f"eps {optimizer.eps:g}")
    if optimizer.name == "SGD" and optimizer.momentum:
        parts.append(f"momentum {optimizer.momentum}")
    if optimizer.scheduler != "CALR":
        parts.append(f"{optimizer.scheduler} schedule")
    names = ("warmup_steps", "clip_norm", "ema_decay", "dropout", "deep_supervision", "batch_dice", "class_balanced")
    parts += [f"{name} {used[name]}" for name in names if used[name]]
    if setup.augmentation is None:
        parts.append("no augmentation")
    else:
        mirrors = [
            f"axis {axis}, {counted(len(pairs), 'pair')} of labels swapped" for axis, pairs in setup.augmentation.mirror
        ]
        parts.append(f"mirrored along {'; '.join(mirrors)}" if mirrors else "not mirrored")
    return ", ".join(parts)


def data_notes(setup: Setup) -> tuple[str, ...]:
    """Notes on the cases: those in no list of the split, and those on both sides of it."""
    notes = outside_note(outside_split(setup.prepared))
    if not setup.trained_on:
        return notes
    folders = [prepared.root.resolve() for prepared in (setup.prepared, setup.prepared_val) if prepared]
    same = len(folders) == 2 and folders[0] == folders[1]
    which = "--data_val is the folder of --data_train: of" if same else "Of"
    seen = counted(len(setup.trained_on), "", "are")
    what = "trained on too" if same else "trained on too, by the voxels"
    text = f"{which} {counted(len(setup.val_cases), 'case')} to validate on {seen} {what}"
    return (*notes, f"{text} ({listed(setup.trained_on)}); scores tell nothing of unseen cases")


def _patient_lines(setup: Setup) -> tuple[str, ...]:
    patients = {case.id: case.patient for case in setup.prepared.cases}
    known = setup.prepared.patients is not None or any(case != patient for case, patient in patients.items())
    return split_notes(patients, known, setup.train_cases, () if setup.prepared_val else setup.val_cases)


def label_lines(setup: Setup) -> list[str]:
    """A line on label values that are not 1, 2, 3, ..., as they are stored or in a folder of an earlier version."""
    lines = []
    if setup.prepared_val is not None and setup.val_values is not None:
        left = [name for value, name in setup.prepared_val.labels.items() if value not in setup.val_values]
        lines += [f"Note: {', '.join(left)} of --data_val: not trained, so background there"] if left else []
    if setup.properties.values:
        return [*lines, f"Labels: {describe_numbering(dict(setup.properties.values))}"]
    largest = max(setup.structures)
    if largest == len(setup.structures):
        return lines
    unused = f"{counted(largest - len(setup.structures), 'output channel', 'stand')} for no structure"
    return [*lines, f"Note: {unused}, as label values go up to {largest}; preprocess.py numbers them without gaps"]


def end_lines(folder: Path, report: Mapping[str, Any], flags: TrainConfig, advise: bool = True) -> list[str]:
    """Say how a run ended, by its run.json, and what to type next; the folds of a command are for use together.

    flags: of the command. advise: whether to say what to type.
    """
    best = report["best"] if flags.folds is None else None
    lines = [f"{report['status']}: step {report['step']} after {duration(report['seconds'])}"]
    compiling = report.get("compile_seconds") or 0
    if advise and flags.max_minutes is not None and compiling > report["seconds"] / 2:
        kept = "what was compiled is kept for the next run"
        lines.append(f"Note: compiling took {duration(compiling)} of it. Train longer by more --max_minutes; {kept}")
    if best is not None:
        score = "" if best["val_dice"] is None else f", validation Dice {best['val_dice']:.4f}"
        lines.append(f"Best: step {best['step']}{score}, in {folder / 'checkpoints' / 'best'}")
    if not advise:
        return lines
    if report["exit_code"] in (130, 143):
        lines.append(f"Next, to continue up to the scores of the held-out cases: {train_line(flags, resume=True)}")
    elif best is not None:
        lines.append(f"Next: {_infer_line(folder / 'checkpoints' / 'best')}")
    return lines


def train_line(flags: TrainConfig, **changes: Any) -> str:
    """The command line of these flags, without those that were not given and have their default."""
    words: list[str] = []
    flags = dataclasses.replace(flags, **changes)
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if field.name != "given" and value is not None and (field.name in flags.given or value != field.default):
            values = value if isinstance(value, list | tuple) else [] if value is True else [value]
            words += [f"--{field.name}", *map(str, values)]
    return command_line("train", *words)


def ensemble_line(folder: Path, trained: int, networks: int) -> str:
    """Say what to type to segment with all networks of a folder together. trained: how many have a checkpoint."""
    line = f"Of {counted(networks, 'network')}, {counted(trained, '', 'have')} a checkpoint. "
    line = "All together: " if trained == networks else line
    return line + _infer_line(folder) if trained else line


def _infer_line(model: Path) -> str:
    return command_line("infer", "--data_path", "SCANS", "--model_path", model, "--output_dir", "PRED")
