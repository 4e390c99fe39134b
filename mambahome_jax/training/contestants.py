"""Who takes part in a duel: flags of train for each contestant, which differ in nothing but what its name says."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from mambahome_jax.config import MODEL_SIZES, Triple, spaced
from mambahome_jax.datasets.prepared import Prepared, detect, read_prepared, usable_cases
from mambahome_jax.errors import ConfigError, SizeError
from mambahome_jax.flags import DuelConfig, TrainConfig
from mambahome_jax.patches.store import Store
from mambahome_jax.preprocessing.grids import Grids, choose_grids
from mambahome_jax.preprocessing.plan import follow_plan
from mambahome_jax.preprocessing.plan_folder import planned_settings
from mambahome_jax.training.setup import model_config, own_voxel_size, twin_of

# With --folds 1 one of so many is held out.
FOLDS_OF_ONE = 5
# Flags of train that are the same for all, or say where a run lies, how it goes on and on how many devices: the minutes
# of each network follow from those.
_DECIDED = {
    *("data_train", "data_val", "hold_out", "output_dir", "checkpoint_name", "folds", "fold", "fold_seed", "members"),
    *("seed", "epochs", "steps", "max_minutes", "minutes_from", "resume", "load_checkpoint", "given"),
    *("parallel", "num_devices", "strategy", "num_processes", "process_id", "coordinator_address"),
}
# Rounds in which the networks change the patch of the others.
_ROUNDS = 10


@dataclass(frozen=True)
class Contestant:
    """name: as typed. folder: the name of its own. flags: of train, all but seed and output_dir. minutes: of each of
    its networks, of which `flags` has those of all in turn."""

    name: str
    folder: str
    flags: TrainConfig
    minutes: float | None


def contestants_of(config: DuelConfig) -> tuple[list[Contestant], list[str]]:
    """The contestants of a duel, the first one first, and what to say of their sizes.

    Raises ConfigError: a word of --against that names none, flags that cannot work. DatasetError: no prepared folder.
    """
    if not detect(config.folder):
        raise ConfigError(f"{config.folder} is not preprocessed; expected a folder that mambahome preprocess wrote")
    changes = [{"model": word} if word in MODEL_SIZES else _changes(word) for word in config.against]
    alike: dict[str, Any] = {
        **{"data_train": config.folder, "fold_seed": 0, "resume": True, "steps": config.steps},
        "folds": FOLDS_OF_ONE if config.folds == 1 else config.folds,
        "fold": 0 if config.folds == 1 else None,
        "max_minutes": config.max_minutes,
    }
    first = as_planned(_flags(alike, {"model": config.model} if config.model else {}))
    # By name, as a recipe that leaves the plan aside leaves its network too.
    own = [{"model": first.model} | each for each in ({}, *changes)]
    alike |= {"steps": first.steps, "epochs": first.epochs, "strides": first.strides}
    minutes = config.max_minutes
    if first.max_minutes is not None:
        # A planned length is of each network already, but counted together.
        minutes = config.max_minutes or first.max_minutes / first.networks
        alike |= {"max_minutes": minutes * first.networks, "minutes_from": "first_step"}
    followed = [as_planned(_flags(alike, each)) for each in own]
    patch, wanted = shared_patch(followed, read_prepared(config.folder))
    alike |= {"patch_size": patch} | ({"batch_size": first.batch_size} if config.equal == "images" else {})
    exempt = [word for word, change in zip(config.against, changes, strict=True) if "patch_size" in change]
    lines = [
        f"Patches of {spaced(patch)} for all"
        + f" but {' and '.join(exempt)}" * bool(exempt)
        + f", as they do not all take {spaced(wanted)}" * (patch != wanted)
    ]
    twin = [f"{name}={value}" for name, value in twin_of(first).items()]
    names = [",".join([first.model, *twin]), *config.against]  # the plan may have chosen a twin
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} takes part twice. Leave it out of --against, or choose another --model")
    for name, flags in zip(names[1:], followed[1:], strict=True):
        if replace(flags, given=()) == replace(followed[0], given=()):
            raise ConfigError(f"{name} changes nothing of {names[0]}. Leave it out of --against")
    folders = [re.sub(r"[^\w.,=-]", "_", name) for name in names]
    typed = [_flags(alike, each) for each in own]
    if config.equal == "memory":
        batches = [as_planned(flags).batch_size for flags in typed]
        lines += ["Batches: " + ", ".join(f"{name} {batch}" for name, batch in zip(names, batches, strict=True))]
    return [Contestant(*parts, minutes) for parts in zip(names, folders, typed, strict=True)], lines


def _flags(alike: Mapping[str, Any], own: Mapping[str, Any]) -> TrainConfig:
    named = {"patch_size", "batch_size", "strides"} & {*alike}
    return TrainConfig(**{**alike, **own}, given=tuple(sorted(named | {*own})))


def as_planned(flags: TrainConfig) -> TrainConfig:
    """The flags with what the plan of their folder says in the place of those that were not given."""
    plan = planned_settings(flags)
    return follow_plan(flags, plan.settings, plan.machine)


def shared_patch(contestants: Sequence[TrainConfig], prepared: Prepared) -> tuple[Triple, Triple]:
    """The patch that all networks take, and that of the first one, which it is near to. Raises ConfigError."""
    store, spacing = Store(prepared.store), own_voxel_size(prepared)
    shapes = [store.entry(case.id).shape for case in usable_cases(prepared)]

    def grids_of(flags: TrainConfig) -> Grids:
        planned = {name: setting.value for name, setting in planned_settings(flags).settings.items()}
        return choose_grids(flags, shapes, spacing, planned)

    wanted = patch = grids_of(contestants[0]).patch_size
    for _ in range(_ROUNDS):
        try:
            for flags in contestants:
                sized = replace(flags, patch_size=patch)
                grids = grids_of(sized)
                network = model_config(sized, 1, 2).with_grids(grids.strides, grids.kernel_sizes)
                network.for_patch(patch).check_size(patch)
            return patch, wanted
        except SizeError as error:
            patch = error.fitting
    raise ConfigError(f"no patch near {spaced(wanted)} suits all contestants. Choose a larger one as patch_size")


def _changes(word: str) -> dict[str, Any]:
    """Flags of train and their values of "mixer=conv,experts=ffn". Raises ConfigError."""
    pairs = [pair.partition("=") for pair in word.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        flags = "flags of train such as mixer=conv or model=SegMamba,lr=0.001"
        raise ConfigError(f"--against {word}; expected a network ({', '.join(MODEL_SIZES)}) or {flags}")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--against {word}: a flag has two values; expected one")
    return {name: _value(name, text, word) for name, _, text in pairs}


def _value(name: str, text: str, word: str) -> Any:
    """Read the value of a flag as the command line of train does."""
    import tyro

    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    if name not in kinds:
        raise ConfigError(f"--against {word}: train has no flag --{name}; mambahome train --help lists all of them")
    if name in _DECIDED:
        raise ConfigError(f"--against {word}: --{name} is the same for all contestants. Leave it out")
    alone = dataclasses.make_dataclass("Alone", [(name, kinds[name])])
    words = [f"--{name}", *text.split()]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            marks = (tyro.conf.FlagConversionOff,)
            return getattr(tyro.cli(alone, args=words, use_underscores=True, config=marks), name)
    except SystemExit as error:
        choices = ", ".join(each for each in get_args(kinds[name]) if isinstance(each, str))
        expected = f"one of {choices}" if choices else f"a value of --{name}, see mambahome train --help"
        raise ConfigError(f"--against {word}: {name} is {text!r}; expected {expected}") from error
