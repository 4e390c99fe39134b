"""Validation during training: whole volumes by sliding window, scored by Dice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambahome_jax.config import Modality
from mambahome_jax.data.store import Store
from mambahome_jax.errors import DatasetError
from mambahome_jax.evaluation.metrics import dice
from mambahome_jax.imaging.intensity import normalise
from mambahome_jax.inference.segment import apply_network
from mambahome_jax.inference.sliding_window import sliding_window
from mambahome_jax.training.distributed import gather
from mambahome_jax.training.loop import Validation
from mambahome_jax.training.sharding import copy_to


@dataclass(frozen=True)
class ValidationSettings:
    """Cases and windows. `labels`: value -> name of the structures scored; modality: instead of each case's own."""

    cases: Sequence[str]
    labels: Mapping[int, str]
    patch_size: tuple[int, int, int]
    overlap: float
    modality: Modality | None = None
    sw_batch_size: int = 2


def make_validate(
    graphdef: nnx.GraphDef, store: Store, settings: ValidationSettings, device: jax.Device
) -> Callable[[Any, Callable[[], bool]], Validation | None]:
    """A function (params, asked to stop?) -> Validation, None when it was asked to stop on the way.

    With several processes each takes every so-manieth case, and all get the same result; device: one of this process.

    Each structure's Dice is its mean over the cases that have it, the overall one the mean over structures. A case that
    cannot be read counts as a failure and the others go on.
    """

    most_likely = jax.jit(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.uint8))
    values = sorted(settings.labels)

    def validate(params: Any, stop: Callable[[], bool]) -> Validation | None:
        params = copy_to(params, device)
        scores: dict[str, list[float | None]] = {}
        failures: dict[str, str] = {}
        stopped = False
        for case in settings.cases[jax.process_index() :: jax.process_count()]:
            stopped = stop()
            if stopped:
                break
            entry = store.entry(case)
            try:
                image = normalise(store.read_image(case), settings.modality or entry.modality, entry.statistics)
                reference = store.read_label(case)
            except DatasetError as error:
                failures[case] = str(error)
                continue
            logits = sliding_window(
                partial(apply_network, graphdef, params),
                image,
                settings.patch_size,
                settings.overlap,
                sw_batch_size=settings.sw_batch_size,
            )
            found = dice(np.asarray(most_likely(logits)), reference, values)
            scores[case] = [None if math.isnan(score) else float(score) for score in found]
        shares = gather({"scores": scores, "failures": failures, "stopped": stopped})
        if any(share["stopped"] for share in shares):
            return None
        scores = {case: row for share in shares for case, row in share["scores"].items()}
        failures = {case: reason for share in shares for case, reason in share["failures"].items()}
        # In the order of the cases, so that the sums have the same bits whatever the number of processes.
        rows = [scores[case] for case in settings.cases if case in scores]
        table = np.array(rows, np.float64).reshape(len(rows), len(values))
        structures = {settings.labels[value]: _mean(column) for value, column in zip(values, table.T, strict=True)}
        return Validation(_mean(list(structures.values())), structures, tuple(failures.items()))

    return validate


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Over what is not nan, nan where nothing is left."""
    present = [float(value) for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
