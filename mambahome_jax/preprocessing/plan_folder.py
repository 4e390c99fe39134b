"""plan: the settings for a folder, as downloaded or preprocessed, and what another machine or model would change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from mambahome_jax.datasets.prepared import Prepared, detect, read_prepared
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import CheckConfig, PlanConfig, PreprocessConfig, TrainConfig
from mambahome_jax.patches.store import Store, StoreEntry
from mambahome_jax.preprocessing.fingerprint import Fingerprint, fingerprint_of_headers, fingerprint_of_prepared
from mambahome_jax.preprocessing.grids import TARGETS
from mambahome_jax.preprocessing.open_dataset import open_checked
from mambahome_jax.preprocessing.plan import (
    PLAN,
    Machine,
    Plan,
    Setting,
    StoredPlan,
    is_given,
    make_plan,
    read_plan,
    write_plan,
)
from mambahome_jax.recipes import as_typed
from mambahome_jax.support.devices import gpu_memory_gib, jax_share
from mambahome_jax.support.keywords import from_keywords, shows_keywords
from mambahome_jax.support.processes import isolated_reads

if TYPE_CHECKING:
    from mambahome_jax.keywords import PlanFlags


@dataclass(frozen=True)
class FolderPlan:
    """The plan for a folder and a machine, and that which the folder has, or without --memory, --model and the like."""

    plan: Plan
    before: Plan
    machine: Machine
    fingerprint: Fingerprint
    prepared: bool


@shows_keywords(PlanConfig)
def plan(**flags: "Unpack[PlanFlags]") -> FolderPlan:
    """Choose settings for a dataset, as `mambahome plan` does, silently; keywords are its flags.

    Raises:
        DatasetError: the folder cannot be read, or none of its scans can.
        ConfigError, OutputError.
    """
    return plan_folder(from_keywords(PlanConfig, flags))


@isolated_reads()
def plan_folder(config: PlanConfig) -> FolderPlan:
    """Choose settings for config.folder; see `plan`."""
    for name, value in (("memory", config.memory), ("max_minutes", config.max_minutes)):
        if value is not None and (value < 0 or (value == 0 and name == "max_minutes")):
            raise ConfigError(f"--{name} {value:g}; expected a positive number")
    prepared, stored = detect(config.folder), StoredPlan({}, "", False)
    if prepared:
        description = read_prepared(config.folder)
        entries = _entries(description)
        fingerprint = fingerprint_of_prepared(description, entries) if entries else None
        if (config.folder / PLAN).is_file():
            stored = read_plan(config.folder / PLAN)
    else:
        dataset = open_checked(CheckConfig(config.folder, dataset=config.dataset))
        fingerprint = fingerprint_of_headers(dataset, PreprocessConfig.orientation)
    if fingerprint is None:
        raise DatasetError("no scan that can be read", file=config.folder, action="See mambahome check.")
    own = Machine(gpu_memory_gib(), jax_share())
    known = dict(stored.settings)
    if prepared:
        known.setdefault("resampling", Setting(description.resampling, "that of the cases of this folder"))
    before = make_plan(fingerprint, own, known)
    machine = own if config.memory is None else Machine(config.memory or None)
    # What a person chose is kept, as preprocess does, but where flags ask for another plan.
    kept = stored.edited and (config.memory, config.model, config.max_minutes) == (None, None, None)
    given = {**(stored.settings if kept else {}), "spacing": before.spacing, "resampling": before.resampling}
    if config.model is not None:
        given["model"] = Setting(config.model, "given by --model")
    if config.max_minutes is not None:
        given["length"] = Setting({"minutes": config.max_minutes}, "given by --max_minutes")
    after = make_plan(fingerprint, machine, given)
    if config.output is not None:
        write_plan(config.output, after, machine, fingerprint, edited=kept)
    return FolderPlan(after, before, machine, fingerprint, prepared)


def planned_settings(flags: TrainConfig) -> StoredPlan:
    """Read the plan of the folder to train on, without settings where it has none.

    Where flags give another network or patch and one of the networks is a U-Net, sizes and grids are planned anew.
    Raises DatasetError: as `read_plan`; a spacing or resampling other than that of the folder's cases.
    """
    folder, file = flags.data_train, flags.data_train / PLAN
    if not (detect(folder) and file.is_file()):
        return StoredPlan({}, "", False)
    stored, prepared = read_plan(file), read_prepared(folder)
    spacing, planned = prepared.spacing, {name: setting.value for name, setting in stored.settings.items()}
    found = actual = ""
    if spacing is not None and not np.allclose(planned.get("spacing", spacing), spacing):
        actual = as_typed(spacing)
        found = f"spacing is {as_typed(planned['spacing'])}, but the cases are resampled to {actual} mm"
    elif planned.get("resampling", prepared.resampling) != prepared.resampling:
        actual = prepared.resampling
        found = f"resampling is {planned['resampling']}, but the cases are resampled by {actual}"
    if found:
        action = "Run preprocess again, which follows the plan, or set it back."
        raise DatasetError(found, file=file, expected=actual, action=action)
    model = flags.model if is_given(flags, "model") else planned.get("model", flags.model)
    other = model != planned.get("model") or flags.patch_size is not None
    if not other or not {model, planned.get("model")} & TARGETS.keys():
        return stored
    of_network = ("model", "patch_size", "strides", "kernel_sizes", "mixer", "batch_size")
    kept = {name: setting for name, setting in stored.settings.items() if name not in of_network}
    kept["model"] = Setting(model, "given")
    if flags.patch_size is not None:
        kept["patch_size"] = Setting(flags.patch_size, "given")
    fingerprint = fingerprint_of_prepared(prepared, _entries(prepared))
    anew = make_plan(fingerprint, Machine.named(stored.machine) or Machine(), kept)
    return stored._replace(settings=anew.settings())


def _entries(prepared: Prepared) -> list[StoreEntry]:
    store = Store(prepared.store)
    return [store.entry(case.id) for case in prepared.cases]
