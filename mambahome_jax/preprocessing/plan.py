"""The plan: settings of preprocessing and training that follow from a dataset and a machine, each with its reason.

Pure: numbers in, settings out. Nothing here reads a scan.
"""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from mambahome_jax.config import (
    MODEL_SIZES,
    AnatomicalAxis,
    Mixer,
    ModelConfig,
    NetworkConfig,
    Precision,
    Resampling,
    multiples_of,
    said_multiples,
)
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.forms import Convert, among, converted, count_up_to, entries
from mambahome_jax.preprocessing.fingerprint import Fingerprint, voxel_size
from mambahome_jax.preprocessing.grids import TARGETS, THICK, Grids, grids_for, patch_and_grids, plan_unet, thick_axis
from mambahome_jax.preprocessing.step_memory import PLANNED_PART, step_gib
from mambahome_jax.recipes import RECIPES, as_typed
from mambahome_jax.support.console import command_line, counted
from mambahome_jax.support.devices import JAX_SHARE
from mambahome_jax.support.files import json_text, read_json, write_json

PLAN = "plan.json"
VERSION = 1
_ONE_SIDED_MM = 100  # narrower scans show one side of the body
_HEART = re.compile(r"(?i)^(?!.*lateral).*(ventric|atri)")  # not the ventricles of the brain
_MOST_VOXELS = 4 * 112 * 112 * 80  # of a step: beyond that, more steps serve better
_MOST_PATCHES = 8
_FEWEST_VOXELS = 32**3  # of a patch that is made smaller for the memory
_CPU_PATCHES = 2
_CPU_REASON = "on a CPU many steps of few patches reach more than few steps of many"
_SMALL_FROM_GIB = 4
# A length is so many passes over every region at so many voxels a second, within bounds in minutes.
_PASSES = {"gpu": 400, "cpu": 60}
_VOXELS_A_SECOND = {"gpu": 40e6, "cpu": 0.4e6}
# A fifth of the patients is held out, but no more than these or this part: what they teach is worth more.
_HELD_OUT, _HELD_OUT_PART = 5, 1 / 20
_MINUTES = {"gpu": (10, 720), "cpu": (13, 480)}


class Setting(NamedTuple):
    """A value, and why it is this one, in a sentence."""

    value: Any
    reason: str


RESAMPLING = Setting("linear", "cubic splines have not been measured to be better")


@dataclass(frozen=True)
class Machine:
    """What a plan is made for: memory of each GPU in GiB, None for a CPU, and the part of it that JAX may take."""

    gpu_gib: float | None = None
    share: float = JAX_SHARE

    @property
    def kind(self) -> str:
        """Return "gpu" or "cpu"."""
        return "cpu" if self.gpu_gib is None else "gpu"

    @property
    def step_gib(self) -> float:
        """GiB that a step may be planned to take; none on a CPU."""
        return 0.0 if self.gpu_gib is None else PLANNED_PART * self.share * self.gpu_gib

    @classmethod
    def named(cls, name: str) -> "Machine | None":
        """Return the machine of that str(), None for another text."""
        found = re.fullmatch(r"a GPU of ([\d.e+]+) GiB(?:, ([\d.e-]+) of it for JAX)?", name)
        if found is None:
            return cls() if name == str(cls()) else None
        return cls(float(found[1]), float(found[2] or JAX_SHARE))

    def __str__(self) -> str:
        if self.gpu_gib is None:
            return "a CPU"
        return f"a GPU of {self.gpu_gib:.3g} GiB" + (
            "" if self.share == JAX_SHARE else f", {self.share:.3g} of it for JAX"
        )


@dataclass(frozen=True)
class Plan:
    """Settings read off the data and the machine, in the order in which they follow from each other.

    spacing: mm; resampling: of images, "linear" or "cubic"; patch_size: voxels; strides, kernel_sizes: see
    `NetworkConfig`; mixer: of MambaHoME; batch_size: on each device; mirror, hold_out: as the flags of train; length:
    {"minutes": ...}, {"epochs": ...} or {"steps": ...}.
    """

    spacing: Setting
    resampling: Setting
    model: Setting
    patch_size: Setting
    strides: Setting
    kernel_sizes: Setting
    mixer: Setting
    batch_size: Setting
    recipe: Setting
    mirror: Setting
    hold_out: Setting
    length: Setting

    def settings(self) -> dict[str, Setting]:
        """Return all settings by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def make_plan(fingerprint: Fingerprint, machine: Machine, given: Mapping[str, Setting] | None = None) -> Plan:
    """Choose every setting for a dataset and the machine that will train.

    given: settings to keep, such as those of a plan that a person edited; the others follow from them.
    """
    chosen = dict(given or {})
    chosen.setdefault("spacing", _choose_spacing(fingerprint))
    chosen.setdefault("resampling", RESAMPLING)
    spacing = chosen["spacing"].value
    shape = np.round(fingerprint.median_shape(spacing)).astype(int).tolist()
    mm = voxel_size(spacing, fingerprint.spacings)
    model = chosen.setdefault("model", _choose_model(machine)).value
    mixer = chosen.setdefault("mixer", _choose_mixer(mm, model)).value
    if model in TARGETS:
        sizes = _choose_by_nnunet(fingerprint, spacing, mm, model, chosen.get("patch_size"))
        if machine.gpu_gib is None:
            sizes["batch_size"] = Setting(_CPU_PATCHES, _CPU_REASON)
    else:
        sizes = _choose_grids(mm, shape, model, mixer, machine, chosen.get("patch_size"))
    for name, setting in sizes.items():
        chosen.setdefault(name, setting)
    patch = chosen["patch_size"].value
    if "batch_size" not in chosen:
        chosen["batch_size"] = _choose_batch(patch, _network(model, chosen["strides"].value, mixer), machine)
    chosen.setdefault("recipe", Setting("strong", "ahead of the published recipe where both were measured"))
    chosen.setdefault("mirror", _choose_mirror(fingerprint))
    chosen.setdefault("hold_out", _choose_hold_out(fingerprint.patients or len(fingerprint.shapes)))
    chosen.setdefault("length", _choose_length(len(fingerprint.shapes), shape, patch, machine))
    return Plan(**chosen)


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, bool]:
    """Choose the spacing to resample to, as nnU-Net's planner does, and say whether a coarse axis is made finer.

    spacings: (cases, 3) mm. shapes: (cases, 3) voxels. Chosen is the median of each axis, (3,) mm; of an axis more
    than 3 times as coarse as the others and has less than a third of their voxels, the 10th percentile, but nothing
    finer than the others.
    """
    target, voxels = np.median(spacings, axis=0), np.median(shapes, axis=0)
    coarse = thick_axis(target)
    if coarse is None or THICK * voxels[coarse] >= np.delete(voxels, coarse).min():
        return target, False
    others = np.delete(target, coarse)
    finer = float(np.percentile(spacings[:, coarse], 10))
    target[coarse] = finer if finer >= others.max() else others.max() + 1e-5
    return target, True


def _choose_spacing(fingerprint: Fingerprint) -> Setting:
    if fingerprint.resampled is not None:
        return Setting(tuple(fingerprint.resampled), "the cases of this folder are resampled to it")
    target, finer = target_spacing(fingerprint.spacings, fingerprint.shapes)
    # Headers hold float32; its rounding is no information.
    values = tuple(float(f"{mm:.6g}") for mm in target)
    cases = counted(len(fingerprint.spacings), "case")
    if not finer:
        return Setting(values, f"the median of each axis over {cases}")
    coarse = int(np.median(fingerprint.spacings, axis=0).argmax())
    return Setting(values, f"the median over {cases}; of axis {coarse}, far coarser than the others, the finest tenth")


def _choose_model(machine: Machine) -> Setting:
    if machine.gpu_gib is None:
        return Setting("MambaHoME_tiny", "on a CPU a larger network would take days")
    if machine.gpu_gib < _SMALL_FROM_GIB:
        return Setting("MambaHoME_tiny", f"a larger network does not train well in {machine.gpu_gib:.3g} GiB")
    return Setting("MambaHoME_small", "the published size has seven times the parameters and overfits small datasets")


def _choose_by_nnunet(
    fingerprint: Fingerprint, spacing: Sequence[float], mm: Sequence[float], model: str, patch: Setting | None
) -> dict[str, Setting]:
    """Choose patch_size, strides, kernel_sizes and batch_size of a U-Net, whatever the GPU."""
    shape, target = fingerprint.median_shape(spacing).tolist(), TARGETS[model]
    cases, size = len(fingerprint.shapes), patch and patch.value
    found = plan_unet(model, mm, shape, cases, fingerprint.classes, size)
    rule = f"as nnU-Net's planner for {model}"
    outputs = f"{found.outputs:,} outputs of its convolutions of at most {target.outputs:,}"
    share = "" if target.share == 1 else f", of at most {target.share:.0%} of the dataset's voxels"
    chosen = _grid_settings(found.grids) | {
        "batch_size": Setting(found.batch_size, f"{rule}: what {target.gib} GB hold by its estimate{share}; 2 at least")
    }
    return chosen if patch else {"patch_size": Setting(found.grids.patch_size, f"{rule}: {outputs}"), **chosen}


def _choose_grids(
    mm: Sequence[float], shape: Sequence[int], model: str, mixer: Mixer, machine: Machine, patch: Setting | None
) -> dict[str, Setting]:
    """Choose patch_size, strides and kernel_sizes. mm, shape: of the median scan after resampling."""
    if patch is None:
        voxels = math.prod(MODEL_SIZES[model].patch_size)
        found = patch_and_grids(mm, shape, voxels)
        # Small enough for a step of two.
        while machine.gpu_gib is not None and voxels > _FEWEST_VOXELS:
            if step_gib(_network(model, found.strides, mixer), found.patch_size, 2) <= machine.step_gib:
                break
            voxels = voxels * 4 // 5
            found = patch_and_grids(mm, shape, voxels)
        scan = " x ".join(map(str, shape))
        reason = f"about {voxels:,} voxels, as long in mm along every axis, or as the median scan of {scan} voxels"
        patch = Setting(found.patch_size, reason)
    else:
        found = grids_for(mm, patch.value)
    return {"patch_size": patch, **_grid_settings(found)}


def _grid_settings(found: Grids) -> dict[str, Setting]:
    multiples = multiples_of(found.strides)
    strides = kernels = "voxels are alike along all axes"
    if len(set(multiples)) > 1:
        strides = f"an axis is halved while it is long and fine enough; in all by {said_multiples(multiples)}"
        kernels = "1 along an axis whose voxels are still twice as long as the finest, else 3"
    return {"strides": Setting(found.strides, strides), "kernel_sizes": Setting(found.kernel_sizes, kernels)}


def _choose_mixer(mm: Sequence[float], model: str) -> Setting:
    if not _has_mixer(model):
        return Setting(ModelConfig.mixer, "of MambaHoME alone")
    if thick_axis(mm) is None:
        return Setting(ModelConfig.mixer, "Mamba's layers, as published")
    reason = "on ACDC, of thick slices too, it was better in the same minutes without Mamba's; --mixer scan has them"
    return Setting("none", reason)


def _choose_batch(
    patch: Sequence[int], network: NetworkConfig, machine: Machine, precision: Precision = "bf16"
) -> Setting:
    if machine.gpu_gib is None:
        return Setting(_CPU_PATCHES, _CPU_REASON)
    most = max(1, min(_MOST_PATCHES, _MOST_VOXELS // math.prod(patch)))
    fitting = (n for n in range(most, 1, -1) if step_gib(network, patch, n, precision) <= machine.step_gib)
    count = next(fitting, 1)
    reason = f"a step takes about {step_gib(network, patch, count, precision):.1f} of {machine.gpu_gib:.3g} GiB"
    if count == most:
        reason += f"; beyond {_MOST_PATCHES} patches or {_MOST_VOXELS:,} voxels more steps serve better"
    return Setting(count, reason)


def _has_mixer(model: str) -> bool:
    return isinstance(MODEL_SIZES[model].model, ModelConfig)


def _network(model: str, strides: Any, mixer: Mixer) -> NetworkConfig:
    return MODEL_SIZES[model].model.replace(strides=strides, **({"mixer": mixer} if _has_mixer(model) else {}))


def _choose_mirror(fingerprint: Fingerprint) -> Setting:
    width = float(np.median(fingerprint.spacings[:, 0] * fingerprint.shapes[:, 0]))
    if fingerprint.alone:
        return Setting(("none",), f"{fingerprint.alone[0]} has no counterpart of the other side among the structures")
    if fingerprint.pairs:
        pairs, example = counted(len(fingerprint.pairs), "pair"), " and ".join(fingerprint.pairs[0])
        if all(_HEART.search(" ".join(pair)) for pair in fingerprint.pairs):
            return Setting(("none",), f"{example} are no mirror images of each other")
        return Setting(("LR",), f"{pairs} of a left and a right structure, such as {example}")
    if width < _ONE_SIDED_MM:
        return Setting(("none",), f"scans {width:.0f} mm wide show one side, so that mirrored ones never occur")
    return Setting(("LR",), "as the strong recipe has it; no structure is of one side")


def _choose_hold_out(patients: int) -> Setting:
    most, usual = max(_HELD_OUT, patients * _HELD_OUT_PART), TrainConfig.hold_out
    every = max(usual, math.floor(patients / most))
    if every == usual:
        return Setting(every, "every fifth patient shows how well the network does on others")
    count = -(-patients // every)
    return Setting(
        every, f"{count} of {patients:,} patients; more of them to train on are worth more. --folds scores all"
    )


def _choose_length(cases: int, shape: Sequence[int], patch: Sequence[int], machine: Machine) -> Setting:
    kind = machine.kind
    regions = cases * max(1.0, math.prod(shape) / math.prod(patch))
    minutes = _PASSES[kind] * regions * math.prod(patch) / _VOXELS_A_SECOND[kind] / 60
    least, most = _MINUTES[kind]
    value = max(least, min(most, round(minutes)))
    speed = _VOXELS_A_SECOND[kind] / 1e6
    seen = f"about {_PASSES[kind]} passes over {counted(cases, 'case')} at {speed:g} million voxels a second"
    if value == round(minutes):
        return Setting({"minutes": value}, f"{seen}; longer may reach more")
    bound = "least" if value == least else "most"
    return Setting({"minutes": value}, f"the {bound} that is planned; {seen} would be {minutes:.0f}")


def _length(value: Any) -> dict[str, float]:
    ((unit, number),) = value.items()
    whole = among(("minutes", "epochs", "steps"))(unit) != "minutes"
    number = count_up_to(math.inf)(number) if whole else float(number)
    if not 0 < number < math.inf:
        raise ValueError(f"{number} is no length")
    return {unit: number}


_NO_SETTINGS = ("version", "machine", "fingerprint", "digest")
_SIZE = entries(count_up_to(1 << 16), 3)
_FORMS: dict[str, tuple[Convert, str]] = {
    "spacing": (entries(float, 3), "three numbers in mm"),
    "resampling": (among(get_args(Resampling)), f"one of {', '.join(get_args(Resampling))}"),
    "model": (among(tuple(MODEL_SIZES)), f"one of {', '.join(MODEL_SIZES)}"),
    "patch_size": (_SIZE, "three positive integers"),
    "strides": (entries(entries(among((1, 2)), 3)), "triples of 1 or 2"),
    "kernel_sizes": (entries(entries(among((1, 3)), 3)), "triples of 1 or 3"),
    "mixer": (among(get_args(Mixer)), f"one of {', '.join(get_args(Mixer))}"),
    "batch_size": (count_up_to(1 << 16), "a positive integer"),
    "recipe": (among(tuple(RECIPES)), f"one of {', '.join(RECIPES)}"),
    "mirror": (entries(among(("none", *get_args(AnatomicalAxis)))), 'axes such as ["LR"], or ["none"]'),
    "hold_out": (lambda n: 0 if n == 0 else 1 + count_up_to(1 << 16)(n - 1), "0, or an integer of 2 or more"),
    "length": (_length, '{"minutes": 30}, {"epochs": 100} or {"steps": 5000}'),
}


class StoredPlan(NamedTuple):
    """What a plan.json holds: settings by name, whom it was made for, and whether a person changed a value since."""

    settings: dict[str, Setting]
    machine: str
    edited: bool


def read_plan(file: Path) -> StoredPlan:
    """Read a plan.json; a setting that a person took out of it is absent.

    Raises DatasetError: missing, damaged, of another version, a setting that there is not or that cannot work.
    """
    action = f"Correct it, or remove {PLAN} and run preprocess again."
    content = read_json(file, action)
    if content.get("version") != VERSION:
        raise DatasetError("of another version, or no plan", file=file, expected=f'"version": {VERSION}', action=action)
    settings = {}
    for name, entry in content.items():
        if name in _NO_SETTINGS:
            continue
        if name not in _FORMS:
            expected = f"settings among {', '.join(_FORMS)}"
            raise DatasetError(f"a setting {name!r}", file=file, expected=expected, action=action)
        reason = entry.get("reason", "") if isinstance(entry, dict) and "value" in entry else None
        if not isinstance(reason, str):
            form = '{"value": ..., "reason": ...}'
            raise DatasetError(f"{name} is {entry!r}", file=file, expected=form, action=action)
        try:
            settings[name] = Setting(converted(name, entry["value"], *_FORMS[name]), reason)
        except ConfigError as error:
            found = f"{name} is {entry['value']!r}"
            raise DatasetError(found, file=file, expected=_FORMS[name][1], action=action) from error
    _require_grids({name: setting.value for name, setting in settings.items()}, file, action)
    edited = content.get("digest") != _digest(settings)
    if "strides" in settings:  # of an earlier version, by which networks were trained with it
        settings.setdefault("mixer", Setting(ModelConfig.mixer, "that of plans which name none"))
    return StoredPlan(settings, str(content.get("machine", "")), edited)


def _require_grids(values: Mapping[str, Any], file: Path, action: str) -> None:
    """Raise DatasetError where there are not as many strides and kernel sizes as the network has grids."""
    network = MODEL_SIZES[values.get("model", "MambaHoME")].model
    strides = values.get("strides", network.strides)
    try:
        network.with_grids(strides, values.get("kernel_sizes", ((3, 3, 3),) * (len(strides) + 1)))
    except ConfigError as error:
        raise DatasetError(str(error), file=file, action=action) from error


def _digest(settings: Mapping[str, Setting]) -> str:
    values = {name: converted(name, setting.value, *_FORMS[name]) for name, setting in settings.items()}
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def write_plan(file: Path, plan: Plan, machine: Machine, fingerprint: Fingerprint, edited: bool = False) -> None:
    """Write the plan, for whom it was made and what was measured, unless the file says so. Raises OutputError.

    edited: it holds what a person chose, which the next reader has to know too.
    """
    settings = {name: setting._asdict() for name, setting in plan.settings().items()}
    content = {"version": VERSION, **settings, "machine": str(machine), "fingerprint": fingerprint.to_json()}
    content |= {"digest": "edited" if edited else _digest(plan.settings())}
    if not file.is_file() or file.read_bytes() != json_text(content).encode():
        write_json(file, content)


# How a training follows it.


def follow_plan(flags: TrainConfig, settings: Mapping[str, Setting], machine: str = "") -> TrainConfig:
    """Fill flags that were not given by the settings of a plan; none of them with --recipe published.

    machine: that of the plan, for which the batch is chosen again where a flag gives another network, patch or
    precision.
    """
    if is_given(flags, "recipe") and flags.recipe == "published":
        return flags
    # nnU-Net mirrors every dataset.
    names = ("model", "patch_size", "batch_size", "recipe", *(("mirror",) if flags.recipe != "nnunet" else ()))
    if flags.folds is None and flags.data_val is None:
        names += ("hold_out",)
    planned = {name: settings[name].value for name in names if name in settings and not is_given(flags, name)}
    if "strides" in settings and not is_given(flags, "strides"):
        planned["strides"] = "auto"
    if "mixer" in settings and not is_given(flags, "mixer") and _has_mixer(planned.get("model", flags.model)):
        planned["mixer"] = settings["mixer"].value
    if "length" in settings and not is_given(flags, "epochs", "steps", "max_minutes"):
        ((unit, number),) = settings["length"].value.items()
        # --members and --folds share --max_minutes; a planned length is of each.
        planned |= {"max_minutes": number * max(flags.networks, 1)} if unit == "minutes" else {unit: number}
    followed, made_for = dataclasses.replace(flags, **planned), Machine.named(machine)
    patch = followed.patch_size or MODEL_SIZES[followed.model].patch_size
    sizes = {"model": None, "patch_size": None, "mixer": ModelConfig.mixer}
    sizes |= {name: settings[name].value for name in sizes if name in settings}
    other = [*sizes.values()] != [followed.model, patch, followed.mixer] or is_given(flags, "precision")
    if "batch_size" in planned and made_for is not None and other and followed.model not in TARGETS:
        strides = ModelConfig.strides
        if followed.strides == "auto" and "spacing" in settings and all(mm > 0 for mm in settings["spacing"].value):
            strides = grids_for(settings["spacing"].value, patch).strides
        network = _network(followed.model, strides, followed.mixer)
        batch = _choose_batch(patch, network, made_for, followed.precision or "bf16")
        return dataclasses.replace(followed, batch_size=batch.value)
    return followed


def train_words(folder: Path, settings: Mapping[str, Setting]) -> list[str]:
    """Write what `mambahome train` takes to train on a prepared folder as planned: network, recipe and length."""
    ((unit, number),) = settings["length"].value.items()
    length = ["--max_minutes", f"{number:g}"] if unit == "minutes" else [f"--{unit}", str(number)]
    recipe = settings["recipe"].value
    # Where that is typed, the plan is left aside.
    named = [] if recipe == "published" else ["--recipe", recipe]
    return ["--data_train", str(folder), "--model", settings["model"].value, *named, *length]


def is_given(flags: TrainConfig, *names: str) -> bool:
    """Whether a person chose any of these flags, by naming it or by another value than the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(flags)}
    return any(name in flags.given or getattr(flags, name) != defaults[name] for name in names)


def plan_lines(flags: TrainConfig, followed: TrainConfig, plan: StoredPlan, kind: str) -> list[str]:
    """Say what a plan decided of a training on a machine of that kind, "cpu" or "gpu"."""
    if followed == flags:
        return []
    chosen = {name: value for name, value in vars(followed).items() if value != getattr(flags, name)}
    lines = [
        f"By {flags.data_train / PLAN}: {', '.join(f'{name} {as_typed(value)}' for name, value in chosen.items())}. "
        "A flag wins; --recipe published trains as the paper did"
    ]
    if plan.machine and (plan.machine == str(Machine())) != (kind == "cpu"):
        memory = ("--memory", "0") if kind == "cpu" else ()
        file = flags.data_train / PLAN
        again = f"{command_line('plan', flags.data_train, *memory, '--output', file)} plans for it"
        if plan.edited:
            again = "as you edited it, it is yours to change"
        lines.append(f"Note: it was made for {plan.machine}, and this machine is of another kind; {again}")
    if kind == "cpu":
        lines.append("On a CPU a small network on small scans is realistic; for whole organs in large scans use a GPU")
    return lines
