"""What a training command comes to: flags, dataset and devices resolved into sizes, steps and settings."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mambahome_jax.config import (
    MODEL_SIZES,
    TWINS,
    AnatomicalAxis,
    Contents,
    DataProperties,
    Mirror,
    MirrorPairs,
    NetworkConfig,
    Precision,
    Triple,
)
from mambahome_jax.datasets.prepared import DESCRIPTION, Prepared, split_cases, usable_cases
from mambahome_jax.datasets.structures import (
    AXES,
    FEWEST_VOXELS,
    axis_along,
    choose_swaps,
    match_structures,
    mirror_pairs,
    shape_of,
    sides,
)
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.patches.store import CRC_LETTERS, Store, StoreEntry, training_ranges
from mambahome_jax.preprocessing.fingerprint import voxel_size
from mambahome_jax.preprocessing.grids import choose_grids, thick_axis
from mambahome_jax.preprocessing.plan import Setting
from mambahome_jax.recipes import AugmentationConfig, Recipe, given_ingredients, resolve
from mambahome_jax.support.devices import default_precision
from mambahome_jax.training.schedule import Schedule
from mambahome_jax.weights.checkpoint import read_checkpoint_config

GPU_WORKERS = 4
# Cases whose label maps are looked at; reading the positions of two structures takes some milliseconds a case.
_CASES = 20
Pair = tuple[int, int]


@dataclass(frozen=True)
class Setup:
    """Everything that follows from the flags once dataset and devices are known.

    val_cases: at most --max_val_cases of those held out. trained_on: those of them whose images are trained on too.
    digests: see `case_digests`, of "train" and of all of "val". schedule: still without a time budget.
    """

    flags: TrainConfig
    recipe: Recipe
    prepared: Prepared
    prepared_val: Prepared | None
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]
    trained_on: tuple[str, ...]
    digests: Mapping[str, Mapping[str, str]]
    val_values: Mapping[int, int] | None
    structures: Mapping[int, str]
    labelled: np.ndarray | None
    model: NetworkConfig
    properties: DataProperties
    patch_size: Triple
    precision: Precision
    augmentation: AugmentationConfig | None
    mirror_lines: tuple[str, ...]
    global_batch: int
    num_workers: int
    schedule: Schedule

    @property
    def validated(self) -> Prepared:
        """The data that the cases held out are of."""
        return self.prepared_val or self.prepared

    @property
    def held_out(self) -> tuple[str, ...]:
        """All cases held out, of which `val_cases` are validated on."""
        return tuple(self.digests["val"])

    def settings(self) -> dict[str, Any]:
        """The settings that change the result of a run: a resumed one has to agree with them."""
        flags, optimizer = self.flags, self.schedule.optimizer
        return {
            "train_cases": f"{len(self.train_cases)} with digest {_digest(self.train_cases)}",
            "patch_size": self.patch_size,
            "global_batch": self.global_batch,
            "total_steps": self.schedule.total_steps,
            "max_minutes": flags.max_minutes,
            **self.recipe.ingredients(),
            "momentum": self.recipe.optimizer.momentum,
            "mirror": () if self.augmentation is None else self.augmentation.mirror,
            "plane_rotation": 0.0 if self.augmentation is None else self.augmentation.plane_rotation,
            "schedule_step": optimizer.schedule_step,
            "steps_per_period": optimizer.steps_per_period,
            "t_max": optimizer.t_max,
            "modality": flags.modality,
            "ct_scale": self.properties.to_json()["ct_scale"],
            "precision": self.precision,
            "labelled": None if self.labelled is None else _digest(map(str, self.labelled.tolist())),
            "freeze_encoder": flags.freeze_encoder,
            "encoder_lr_scale": optimizer.encoder_lr_scale,
            "seed": flags.seed,
            # The state of the loader's iterator has another form for another number.
            "num_workers": self.num_workers,
        }


def make_setup(
    flags: TrainConfig,
    prepared: Prepared,
    prepared_val: Prepared | None,
    devices: int,
    recorded: tuple[Mirror, ...] = (),
    settings: Mapping[str, Setting] | None = None,
) -> Setup:
    """Resolve every default that depends on the dataset or the devices.

    recorded: the mirrors that the run to be resumed began with. settings: of the plan, but for those that flags give.
    Raises ConfigError for flags that cannot work, DatasetError where there is nothing to train on.
    """
    _check_flags(flags)
    recipe = resolve(flags)
    train, held_out = _split(flags, prepared, prepared_val)
    val = held_out[: flags.max_val_cases]
    store = Store(prepared.store)
    entries = [store.entry(case) for case in train]
    val_store = store if prepared_val is None else Store(prepared_val.store)
    val_entries = [val_store.entry(case) for case in held_out]
    # Of all cases, so that networks which hold out others have the same.
    usable = [store.entry(case.id) for case in usable_cases(prepared)]
    planned = {name: setting.value for name, setting in (settings or {}).items()}
    grids = choose_grids(flags, [entry.shape for entry in usable], own_voxel_size(prepared), planned)
    classes, named = _classes(flags, prepared, usable)
    network = model_config(flags, in_chans=entries[0].channels, out_chans=classes)
    structures = named or {1: "label_1"}
    asked = "mirror" in given_ingredients(flags) and "mirror" not in (settings or {})
    augmentation, mirror_lines = make_augmentation(recipe, prepared, named, explicit=asked, recorded=recorded)
    mirrors = () if augmentation is None else augmentation.mirror
    properties = DataProperties(
        spacing=prepared.spacing,
        resampling=prepared.resampling,
        orientation=prepared.orientation,
        modality=flags.modality or Counter(entry.modality for entry in usable).most_common(1)[0][0],
        labels=tuple(named.items()),
        channels=tuple(prepared.channels),
        patch_size=grids.patch_size,
        ct_normalisation=prepared.ct_normalisation,
        mirror=tuple(name for name, _ in _anatomical(mirrors, prepared.orientation)),
        values=tuple(sorted(prepared.values.items())),
        ranges=training_ranges(entries, named, flags.modality),
        mirror_pairs=_anatomical(mirrors, prepared.orientation) or None,
        trained_on=_contents(entries),
        held_out=_contents(val_entries),
    )
    return Setup(
        flags=flags,
        recipe=recipe,
        prepared=prepared,
        prepared_val=prepared_val,
        train_cases=train,
        val_cases=val,
        trained_on=tuple(trained_on(entries, val_entries[: len(val)])),
        digests={"train": case_digests(entries), "val": case_digests(val_entries)},
        val_values=values_of_training(prepared_val, held_out, prepared, structures) if prepared_val else None,
        structures=structures,
        labelled=labelled_classes(prepared, train, classes),
        model=network.with_grids(grids.strides, grids.kernel_sizes).for_patch(grids.patch_size),
        properties=properties,
        patch_size=grids.patch_size,
        precision=flags.precision or default_precision(),
        augmentation=augmentation,
        mirror_lines=mirror_lines,
        global_batch=flags.batch_size * devices,
        num_workers=_workers(flags),
        schedule=_schedule(flags, recipe, -(-len(train) // (flags.batch_size * devices))),
    )


def _check_flags(flags: TrainConfig) -> None:
    at_least_one = ("batch_size", "epochs", "skip_val", "steps", "val_every", "checkpoint_every", "keep_last")
    bounds = dict.fromkeys((*at_least_one, "max_val_cases"), 1) | {"num_workers": 0, "encoder_lr_scale": 0}
    for name, least in bounds.items():
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}; expected {least} or more")
    if flags.hold_out < 0 or flags.hold_out == 1:
        raise ConfigError(f"--hold_out {flags.hold_out}; expected 0, or 2 or more")
    if flags.max_minutes is not None and not flags.max_minutes > 0:
        raise ConfigError(f"--max_minutes {flags.max_minutes:g}; expected a positive number")
    if flags.max_minutes is not None and flags.steps is not None:
        raise ConfigError(f"--max_minutes {flags.max_minutes:g} with --steps {flags.steps}; expected one of the two")
    if not 0 <= flags.overlap < 1:
        raise ConfigError(f"--overlap {flags.overlap}; expected at least 0 and below 1")


def _split(
    flags: TrainConfig, prepared: Prepared, prepared_val: Prepared | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cases to train on, and those held out to validate on."""
    train, val = split_cases(prepared, flags.seed, flags.hold_out)
    if prepared_val is not None:
        # Nothing has to be held out of the training folder but what it marks itself.
        marked = {case.id for case in prepared.cases if case.split == "val"}
        train = [case.id for case in prepared.cases if case.id in {*train, *val} - marked]
        val = [case.id for case in prepared_val.cases if case.label is not None]
        if not val:
            raise DatasetError("no case with a label to validate on", file=prepared_val.root)
    if not train:
        skipped = f" ({len(prepared.skipped)} were skipped)" if prepared.skipped else ""
        found = f"no case to train on among {len(prepared.cases)}{skipped}"
        expected = "at least one with a label that is not marked val or test"
        raise DatasetError(found, file=prepared.root / "dataset.json", expected=expected)
    return tuple(train), tuple(val)


def _classes(flags: TrainConfig, prepared: Prepared, entries: Sequence[StoreEntry]) -> tuple[int, dict[int, str]]:
    """Number of classes, background included, and {value: name} of the structures among them."""
    present = {value for entry in entries for value in entry.foreground_counts}
    needed = max(present, default=0) + 1
    if flags.classes is not None and flags.classes < needed:
        raise ConfigError(f"--classes {flags.classes}, but labels go up to {needed - 1}; expected at least {needed}")
    values = {*prepared.labels, *present}
    classes = flags.classes or max(values | {1}) + 1
    return classes, {v: prepared.labels.get(v, f"label_{v}") for v in sorted(values) if 0 < v < classes}


def _schedule(flags: TrainConfig, recipe: Recipe, steps_per_epoch: int) -> Schedule:
    total = flags.steps or flags.epochs * steps_per_epoch
    if flags.steps is None:
        # As published: the schedule steps with the validations.
        period, t_max = flags.skip_val * steps_per_epoch, max(flags.epochs // flags.skip_val, 1)
    else:
        period, t_max = steps_per_epoch, -(-total // steps_per_epoch)
    scale = 0.0 if flags.freeze_encoder else flags.encoder_lr_scale
    timed = flags.max_minutes is not None
    # In a given time the default would spend most of it on validation; the budget then spaces them.
    own_validations = timed and flags.val_every is None and flags.skip_val == 1
    return Schedule(
        replace(recipe.optimizer, steps_per_period=period, t_max=t_max, encoder_lr_scale=scale),
        total_steps=None if timed else total,
        steps_per_epoch=steps_per_epoch,
        val_every=None if own_validations else flags.val_every or flags.skip_val * steps_per_epoch,
        checkpoint_every=flags.checkpoint_every,
    )


def _workers(flags: TrainConfig) -> int:
    if flags.num_workers is not None:
        return flags.num_workers
    return GPU_WORKERS if jax.default_backend() == "gpu" else 0


# --- Network and patch -----------------------------------------------------------------------------------------------


def twin_of(flags: TrainConfig) -> dict[str, str]:
    """The flags that make the network a twin, with their values; none where it is as published."""
    return {name: value for name in TWINS if (value := getattr(flags, name)) != getattr(TrainConfig, name)}


def model_config(flags: TrainConfig, in_chans: int, out_chans: int) -> NetworkConfig:
    """The size that --model picks, or a twin of it, widened to --feature_size in all its stages."""
    model, twin = MODEL_SIZES[flags.model].model, twin_of(flags)
    model = model.replace(in_chans=in_chans, out_chans=out_chans, use_checkpoint=flags.use_checkpoint, **twin)
    if flags.feature_size is None:
        return model
    if flags.feature_size < 1:
        raise ConfigError(f"--feature_size {flags.feature_size}; expected 1 or more")
    return model.widened(flags.feature_size)


def own_voxel_size(prepared: Prepared) -> tuple[float, float, float]:
    return voxel_size(prepared.spacing or (0, 0, 0), [case.spacing for case in prepared.cases])


# --- Labels ----------------------------------------------------------------------------------------------------------


def values_of_training(
    prepared_val: Prepared, cases: Sequence[str], prepared: Prepared, structures: Mapping[int, str]
) -> dict[int, int] | None:
    """Label value of --data_val -> that of the training data, as each folder numbers its own; None where all are equal.

    cases: of `prepared_val`. structures: value -> name, of the training. What training lacks is left out.
    Raises DatasetError: no structure of these cases is one of the training.
    """
    store = Store(prepared_val.store)
    present = sorted({value for case in cases for value in store.entry(case).foreground_counts})
    names = {value: f"label_{prepared_val.values.get(value, value)}" for value in present} | dict(prepared_val.labels)
    values = match_structures(names, structures, prepared_val.values, prepared.values)
    if structures and present and not values.keys() & {*present}:
        theirs, ours = (", ".join(f"{value} {name}" for value, name in table.items()) for table in (names, structures))
        action = "Preprocess both folders with the same dataset.json or --label_map."
        file = prepared_val.root / DESCRIPTION
        raise DatasetError(f"structures {theirs}", file=file, expected=ours, action=action)
    return None if all(values.get(value) == value for value in present) else values


def labelled_classes(prepared: Prepared, cases: Sequence[str], classes: int) -> np.ndarray | None:
    """(cases, classes) bool: the classes that the dataset of each case has labels of; None where all have all."""
    of_case = {case.id: case.labelled for case in prepared.cases}
    rows = [[values is None or value in (0, *values) for value in range(classes)] for values in map(of_case.get, cases)]
    table = np.array(rows, bool)
    return None if table.all() else table


# --- Augmentation and its mirrors ------------------------------------------------------------------------------------


def make_augmentation(
    recipe: Recipe,
    prepared: Prepared,
    structures: Mapping[int, str],
    explicit: bool = True,
    recorded: tuple[Mirror, ...] = (),
) -> tuple[AugmentationConfig | None, tuple[str, ...]]:
    """What a recipe asks of augment(), None for none, and what to say of its mirrors.

    explicit: see `choose_mirrors`; recorded: see `make_setup`.
    """
    if not recipe.augment:
        return None, ()
    mirrors, lines = choose_mirrors(recipe.mirror, prepared, structures, explicit)
    if mirrors != recorded and {axis for axis, _ in mirrors} == {axis for axis, _ in recorded}:
        mirrors, lines = recorded, ("In mirrored scans labels trade places as when this run began",)
    size = own_voxel_size(prepared)
    plane_rotation = 0.0 if thick_axis(size) is None else recipe.augmentation.plane_rotation
    return replace(recipe.augmentation, mirror=mirrors, voxel_size=size, plane_rotation=plane_rotation), lines


def choose_mirrors(
    axes: Sequence[AnatomicalAxis | str], prepared: Prepared, structures: Mapping[int, str], explicit: bool
) -> tuple[tuple[Mirror, ...], tuple[str, ...]]:
    """The mirrors of a training and what to say of them.

    Every labelled case but those of the test split is looked at, so that networks which hold out others agree.
    Raises ConfigError where a side has no counterpart among the labels and the axis was asked for (`explicit`); that of
    a recipe is left out then, and said.
    """
    mirrors: list[Mirror] = []
    lines: list[str] = []
    for name in axes:
        if name == "none":
            continue
        pairs, alone = sides(structures, name)
        if alone and explicit:
            mirror_pairs(structures, name)
        if alone:
            lines.append(f"Not mirrored along {name}: the labels have no counterpart of {', '.join(alone)}")
            continue
        axis = axis_along(name, prepared.orientation)
        swapped, more = choose_swaps(structures, pairs, _shapes(prepared, pairs), axis)
        mirrors.append((axis, swapped))
        lines += more
    return tuple(mirrors), tuple(lines)


def recorded_mirrors(run: Path) -> tuple[Mirror, ...]:
    """The mirrors that an earlier part of the run trained with, by its last checkpoint. Raises CheckpointError."""
    mirrors = read_checkpoint_config(run / "checkpoints" / "last").get("training", {}).get("mirror", ())
    return tuple((axis, tuple((one, other) for one, other in pairs)) for axis, pairs in mirrors)


def _shapes(prepared: Prepared, pairs: Sequence[Pair]) -> dict[Pair, list[tuple[np.ndarray, np.ndarray]]]:
    """The shapes of both structures of each pair, in up to _CASES cases that have both."""
    if not pairs:
        return {}
    store = Store(prepared.store)
    usable = [case.id for case in prepared.cases if case.label is not None and case.split != "test"]
    counts = {case: store.entry(case).foreground_counts for case in usable}
    chosen: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        both = [case for case in usable if min(counts[case].get(value, 0) for value in pair) >= FEWEST_VOXELS]
        for index in np.unique(np.linspace(0, len(both) - 1, min(len(both), _CASES)).astype(int)):
            chosen[both[index]].append(pair)
    shapes = defaultdict(list)
    for case, those in chosen.items():
        spacing = store.entry(case).spacing
        for pair in those:
            one, other = (shape_of(store.class_positions(case, v), counts[case][v], spacing) for v in pair)
            shapes[pair].append((one, other))
    return shapes


def _anatomical(mirrors: Sequence[Mirror], orientation: str) -> MirrorPairs:
    """The mirrors by the names of their axes."""
    pairs = dict(mirrors)
    axes = {name: axis_along(name, orientation) for name in AXES}
    return tuple((name, pairs[axis]) for name, axis in axes.items() if axis in pairs)


# --- What tells the data of a case from other data -------------------------------------------------------------------


def case_digests(entries: Iterable[StoreEntry]) -> dict[str, str]:
    """{case: what tells its data from other data}, read off the store's index: grid, intensities, voxels a class, and
    a checksum of all voxels, which stores of earlier versions lack."""
    return {entry.id: _case_digest(entry) for entry in entries}


def trained_on(train: Iterable[StoreEntry], val: Iterable[StoreEntry]) -> list[str]:
    """Ids of those in `val` whose image is that of a case in `train`, or was made of the same files, whatever the two
    are called."""
    train, val = list(train), list(val)
    # Where a store of an earlier version has none, intensities to the last digit have to do.
    checksums = all(entry.checksum for entry in (*train, *val))
    known = {_image_key(entry, checksums) for entry in train}
    files = {content for entry in train if (content := _files(entry))}
    return [entry.id for entry in val if _image_key(entry, checksums) in known or _files(entry) in files]


def _image_key(entry: StoreEntry, checksum: bool) -> str:
    return json_digest(
        [entry.shape, entry.channels, _intensities(entry), entry.checksum[:CRC_LETTERS] if checksum else ""]
    )


def _contents(entries: Sequence[StoreEntry]) -> Contents | None:
    """The digests of each case; None where an earlier version made them all."""
    return tuple(entry.contents for entry in entries) if any(entry.contents for entry in entries) else None


def _files(entry: StoreEntry) -> str | None:
    """Digest of the files that a case was made of, at whatever spacing; None where an earlier version made it."""
    sources = entry.fingerprint.get("sources")
    return sources.get("content") if isinstance(sources, Mapping) else None


def _intensities(entry: StoreEntry) -> list[tuple[float, ...]]:
    known = entry.statistics
    return [known.mean, known.std, known.minimum, known.maximum]


def _case_digest(entry: StoreEntry) -> str:
    counts = None if entry.class_counts is None else sorted(entry.class_counts.items())
    grid = [entry.shape, entry.channels, entry.spacing, entry.affine, entry.modality]
    return f"{json_digest([grid, _intensities(entry), counts, entry.labelled])}:{entry.checksum}"


def json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
