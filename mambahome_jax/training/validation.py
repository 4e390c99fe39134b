"""Validation during training: whole volumes by sliding window, scored by Dice."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mambahome_jax.config import Modality
from mambahome_jax.errors import CheckpointError, DatasetError
from mambahome_jax.evaluation.metrics import dice
from mambahome_jax.evaluation.results import finite_mean
from mambahome_jax.imaging.normalisation import Normalisation, normalisations
from mambahome_jax.imaging.pictures import render
from mambahome_jax.imaging.volume import Volume, replace_values
from mambahome_jax.inference.ensemble import apply_network, compiled_network
from mambahome_jax.inference.targets import Labels
from mambahome_jax.inference.tiled import Replica, WindowSettings, predict_tiled, window_size, window_starts
from mambahome_jax.patches.store import Store, StoreEntry
from mambahome_jax.support.processes import in_thread
from mambahome_jax.training.distributed import copy_to, gather, own_device
from mambahome_jax.training.setup import Setup


@dataclass(frozen=True)
class Validation:
    """Mean Dice over structures, nan where no case had any, and that of each structure."""

    dice: float
    structures: Mapping[str, float]
    failures: tuple[tuple[str, str], ...] = ()
    seconds_again: float | None = None
    """How long the same would take once more, where that is known: the first one compiles."""
    picture: np.ndarray | None = None
    """RGB (rows, columns, 3) uint8 of a case, the same one each time."""
    seconds: float = math.nan
    """How long it took."""


# (params, asked to stop?) -> result, or None where it was interrupted
Validate = Callable[[Any, Callable[[], bool]], Validation | None]


@dataclass(frozen=True)
class ValidationSettings:
    """Cases and windows. `labels`: value -> name of the structures scored; normalise: by each case's modality.
    values: label value of the cases -> that of training, None where they are the same. say: told where the device has
    too little memory for `sw_batch_size` windows."""

    cases: Sequence[str]
    labels: Mapping[int, str]
    patch_size: tuple[int, int, int]
    overlap: float
    normalise: Mapping[Modality, Normalisation] = field(default_factory=normalisations)
    sw_batch_size: int = 2
    values: Mapping[int, int] | None = None
    say: Callable[[str], None] = warnings.warn

    @classmethod
    def of(cls, setup: Setup, cases: Sequence[str], say: Callable[[str], None]) -> "ValidationSettings":
        """How cases are predicted in the validations of a training, and once more at its end."""
        return cls(
            *(cases, setup.structures, setup.patch_size, setup.flags.overlap),
            normalise=normalisations(setup.properties.ct_normalisation, setup.flags.modality),
            sw_batch_size=setup.flags.batch_size,
            values=setup.val_values,
            say=say,
        )


def validation_steps(setup: Setup) -> float:
    """How many training steps take as long as a validation, if the backward pass takes twice as long as the forward."""
    store, patch = Store(setup.validated.store), setup.patch_size
    shapes = [np.maximum(store.entry(case).shape, patch).tolist() for case in setup.val_cases]
    windows = [len(window_starts(shape, patch, setup.flags.overlap)) for shape in shapes]
    return sum(windows) / (3 * setup.global_batch)


def compile_ahead(
    graphdef: nnx.GraphDef,
    params: Any,
    channels: int,
    settings: ValidationSettings,
    device: jax.Device,
    after: Future[Any] | None = None,
) -> Future[Any]:
    """Compile the network for the windows of a validation in a thread, beside what follows; params: of that form.

    after: what is waited for before, as XLA measures on the device which of its kernels are the fastest.
    It is lowered before this returns: Pallas numbers the kernels of a process in that order, by which JAX's cache knows
    a program. A failure is left to the validation, which then compiles for itself.
    """
    here = SingleDeviceSharding(device)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), params)
    shape = (settings.sw_batch_size, *settings.patch_size, channels)
    lowered = compiled_network().lower(graphdef, like, jax.ShapeDtypeStruct(shape, np.float32, sharding=here))

    def compiled() -> Any:
        if after is not None:
            after.result()  # what fails is tried again with another size
        return lowered.compile()

    return in_thread(compiled)


def open_validation(
    graphdef: nnx.GraphDef,
    params: Any,
    setup: Setup,
    devices: Sequence[jax.Device],
    say: Callable[[str], None],
    after: Future[Any] | None = None,
) -> Validate | None:
    """What validates the network on the cases held out, compiled beside the training; None where there are none.

    params: like those that will be validated. after: see `compile_ahead`.
    """
    if not setup.val_cases:
        return None
    settings, device = ValidationSettings.of(setup, setup.val_cases, say), own_device(devices)
    ahead = compile_ahead(graphdef, params, setup.model.in_chans, settings, device, after)
    return make_validate(graphdef, Store(setup.validated.store), settings, device, ahead)


def make_validate(
    graphdef: nnx.GraphDef,
    store: Store,
    settings: ValidationSettings,
    device: jax.Device,
    ahead: Future[Any] | None = None,
) -> Validate:
    """Make a function (params, asked to stop?) -> Validation, None when it was asked to stop on the way.

    Each structure's Dice is its mean over the cases that have it, the overall one the mean over structures. A case that
    cannot be read, or with logits that are not finite, counts as a failure and the others go on. Several processes
    share the cases, and all get the same result; device: one of this process. ahead: of `compile_ahead`.
    """
    values = sorted(settings.labels)

    def validate(params: Any, stop: Callable[[], bool]) -> Validation | None:
        # What it compiled is then in the cache of jit.
        wait([] if ahead is None else [ahead])
        network = Replica(device, partial(apply_network, graphdef, copy_to(params, device)))
        scores: dict[str, list[float | None]] = {}
        failures: dict[str, str] = {}
        stopped = False
        first_ended: float | None = None
        picture: np.ndarray | None = None
        for case in settings.cases[jax.process_index() :: jax.process_count()]:
            stopped = stop()
            if stopped:
                break
            entry = store.entry(case)
            try:
                image, reference = read_case(store, case, settings)
                prediction = predict_case(network, image, entry, settings)
            except (DatasetError, CheckpointError) as error:
                failures[case] = str(error)
                continue
            if picture is None:
                picture = _picture(entry, image, prediction, reference, settings)
            scores[case] = [finite_or_none(float(score)) for score in dice(prediction, reference, values)]
            first_ended = first_ended or time.perf_counter()
        # Without what the first case alone took: it may have compiled.
        seconds_again = None
        if first_ended is not None and len(scores) > 1:
            seconds_again = (time.perf_counter() - first_ended) * len(scores) / (len(scores) - 1)
        shares = gather({"scores": scores, "failures": failures, "stopped": stopped})
        if any(share["stopped"] for share in shares):
            return None
        scores = {case: row for share in shares for case, row in share["scores"].items()}
        failures = {case: reason for share in shares for case, reason in share["failures"].items()}
        # In the order of the cases, so that the sums have the same bits whatever the number of processes.
        rows = [scores[case] for case in settings.cases if case in scores]
        table = np.array(rows, np.float64).reshape(len(rows), len(values))
        means = finite_mean(table, axis=0)
        structures = {settings.labels[value]: float(mean) for value, mean in zip(values, means, strict=True)}
        return Validation(float(finite_mean(means)), structures, tuple(failures.items()), seconds_again, picture)

    return validate


def read_case(store: Store, case: str, settings: ValidationSettings) -> tuple[np.ndarray, np.ndarray]:
    """Image (D, H, W, in) as stored, and labels (D, H, W) by the numbers of training. Raises DatasetError."""
    image, reference = store.read_image(case), store.read_label(case)
    return image, reference if settings.values is None else replace_values(reference, settings.values)


def predict_case(network: Replica, image: np.ndarray, entry: StoreEntry, settings: ValidationSettings) -> np.ndarray:
    """Labels (D, H, W). The logits of a window's depth exist at a time, and the normalised image of one."""
    normalise = partial(settings.normalise[entry.modality], statistics=entry.statistics)

    def slab(axis: int, start: int, stop: int) -> np.ndarray:
        planes = np.moveaxis(image, axis, 0)[start:stop]
        return normalise(np.moveaxis(planes, 0, axis))

    shape = image.shape[:3]
    labels = Labels([np.arange(n, dtype=np.float64) for n in shape], "nearest")
    roi = window_size(shape, settings.patch_size)
    windows = WindowSettings(roi, settings.overlap, sw_batch_size=settings.sw_batch_size)
    predict_tiled([[network]], slab, shape, windows, [labels], say=settings.say)
    assert labels.result is not None
    return labels.result


def _picture(
    entry: StoreEntry, image: np.ndarray, prediction: np.ndarray, reference: np.ndarray, settings: ValidationSettings
) -> np.ndarray:
    """Prediction above reference on the same slices, those of the reference; RGB (rows, columns, 3) uint8."""
    scan = Volume(image, np.array(entry.affine))
    rows = []
    for what, labels in (("prediction", prediction), ("reference", reference)):
        named, shown = f"{entry.id}: {what}", Volume(labels, scan.affine)
        rows.append(np.asarray(render(scan, shown, settings.labels, entry.modality, named, slices_of=reference)))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])


def finite_or_none(value: float) -> float | None:
    """The value, None for nan and infinity."""
    return value if math.isfinite(value) else None
