"""Training patches through Grain: shuffled, cropped around the foreground, normalised, batched, exactly resumable."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags
from numpy.typing import ArrayLike

from mambahome_jax.config import Modality
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.imaging.normalisation import Normalisation, normalisations
from mambahome_jax.patches.store import Store, StoreEntry
from mambahome_jax.patches.workers import CaseNotes, WatchedLoader
from mambahome_jax.support.console import counted
from mambahome_jax.support.processes import end_with_parent

_THREADS = 4  # each prepares one batch ahead


def make_loader(
    store: Store,
    cases: Sequence[str],
    patch_size: Sequence[int],
    batch_size: int,
    *,
    seed: int = 0,
    num_workers: int = 0,
    positive_fraction: float = 0.75,
    class_balanced: bool = False,
    normalise: Mapping[Modality, Normalisation] | None = None,
    share: tuple[int, int] = (0, 1),
) -> "grain.IterDataset | WatchedLoader":
    """Make endless batches of random patches.

    A batch is a dict: "image" (batch, depth, height, width, channels) float32, normalised with the case's own
    statistics and then zero-padded where the volume is smaller than the patch; "label" (batch, depth, height, width)
    int32; "case" (batch,) int32, index into `cases`. Every case comes once before any comes again.

    `iter()` of the result has get_state() (a dict for JSON), set_state(state), after which the same batches follow, and
    close(), which has to be called. Same seed, same batches, whatever `num_workers` is: 0 reads in threads.

    cases: ids in `store`, all with a label. positive_fraction: share of patches centred on a foreground voxel; the rest
    lie evenly in the body box. class_balanced: draw the foreground class evenly, not by its voxels. normalise: by each
    case's modality. share: (n, of so many) equal parts of each batch; only its patches are read, and the state is that
    of the whole. Raises DatasetError: no cases, an unknown one, one without a label. ConfigError: sizes that cannot be.
    TrainingError, while iterating: a worker died or hangs.
    """
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ConfigError(f"patch_size is {tuple(patch_size)}; expected three positive numbers")
    size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))
    part, parts = share
    if batch_size < 1 or batch_size % parts:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1, and a multiple of {parts}")
    if not cases:
        raise DatasetError("no case to train on", file=store.root, expected="at least one case with a label")
    unlabelled = [case for case in cases if store.entry(case).class_counts is None]
    if unlabelled:
        raise DatasetError(f"{counted(len(unlabelled), 'case', 'have')} no label", case=unlabelled[0], file=store.root)
    notes = CaseNotes() if num_workers else None
    normalise = normalise or normalisations()
    patch = RandomPatch(store, tuple(cases), size, positive_fraction, class_balanced, normalise, notes)
    dataset = (
        grain.MapDataset.source(range(len(cases)))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(patch)
        .batch(batch_size // parts, drop_remainder=True)
    )[part::parts]
    if notes is None:
        return dataset.to_iter_dataset(grain.ReadOptions(_THREADS, _THREADS))
    if not flags.FLAGS.is_parsed():
        # Grain's worker processes read absl flags, which only a program started through absl.app has parsed.
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    threads = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
    return WatchedLoader(threads.mp_prefetch(options, worker_init_fn=_begin), notes)


def _begin(index: int, count: int) -> None:
    end_with_parent()


@dataclass(frozen=True)
class RandomPatch(grain.transforms.RandomMap):
    """From an index into `cases` to one patch; see `make_loader`."""

    store: Store
    cases: tuple[str, ...]
    size: tuple[int, int, int]
    positive_fraction: float
    class_balanced: bool
    normalise: Mapping[Modality, Normalisation]
    notes: CaseNotes | None = None

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One patch of cases[index]: image (D, H, W, C) float32, label (D, H, W) int32, case () int32."""
        case = self.cases[index]
        with contextlib.nullcontext() if self.notes is None else self.notes.reading(case):
            centre = draw_centre(self.store, case, rng, self.positive_fraction, self.class_balanced)
            image, label = read_patch(self.store, case, centre, self.size, self.normalise)
        return {"image": image, "label": label, "case": np.asarray(index, np.int32)}


def draw_centre(
    store: Store, case: str, rng: np.random.Generator, positive_fraction: float, class_balanced: bool
) -> np.ndarray:
    """Draw the centre of a patch, int (3,), in voxels: on the foreground, or anywhere in the body box."""
    entry = store.entry(case)
    counts = entry.foreground_counts
    if counts and rng.random() < positive_fraction:
        weights = np.array([1.0 if class_balanced else count for count in counts.values()])
        value = list(counts)[rng.choice(len(counts), p=weights / weights.sum())]
        positions = store.class_positions(case, value)
        return positions[rng.integers(len(positions))]
    return rng.integers(*entry.body_box)


def patch_start(centre: ArrayLike, size: ArrayLike, shape: ArrayLike) -> np.ndarray:
    """Place the patch around `centre`: int (3,), its first voxel.

    It is moved to lie inside the volume along every axis where it fits (as MONAI's RandCropByPosNegLabel), else placed
    so that the volume lies in its middle (negative start).
    """
    half, room = np.asarray(size) // 2, np.asarray(shape) - np.asarray(size)
    return np.where(room >= 0, np.clip(np.asarray(centre) - half, 0, np.maximum(room, 0)), room // 2)


def read_patch(
    store: Store,
    case: str,
    centre: ArrayLike,
    size: Sequence[int],
    normalise: Mapping[Modality, Normalisation] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image (*size, channels) float32, normalised, and its label (*size) int32; zeros outside the volume."""
    entry: StoreEntry = store.entry(case)
    start = patch_start(centre, size, entry.shape)
    stop = start + np.asarray(size)
    image = store.read_image(case, tuple(start), tuple(stop))
    label = store.read_label(case, tuple(start), tuple(stop))
    image = (normalise or normalisations())[entry.modality](image, entry.statistics)
    inside = tuple(slice(max(-first, 0), max(-first, 0) + n) for first, n in zip(start, label.shape, strict=True))
    patch_image = np.zeros((*size, image.shape[3]), np.float32)
    patch_label = np.zeros(size, np.int32)
    patch_image[inside], patch_label[inside] = image, label
    return patch_image, patch_label
