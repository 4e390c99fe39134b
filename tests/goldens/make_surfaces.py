"""Writes surfaces.npz: metrics of phantom pairs by MONAI and by the package surface-distance (DeepMind's).

python tests/goldens/make_surfaces.py      in an environment with monai, torch, surface-distance, numpy and scipy

Each pair: `<pair>/prediction` and `<pair>/reference` uint8 (D, H, W) with classes 1 to 3, `<pair>/spacing` (3,) mm, and
one float64 array (3,) a metric, `<pair>/<package>/<metric>`. Versions stand in `versions`.
"""

import importlib.metadata
import warnings
from pathlib import Path

import numpy as np

TOLERANCES = (1.0, 2.5)
CLASSES = (1, 2, 3)
Pairs = dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]


def ellipsoid(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    grid = np.indices(shape).reshape(3, -1).T
    return (((grid - centre) / radii) ** 2).sum(axis=1).reshape(shape) <= 1


def stack(shape: tuple[int, ...], *masks: np.ndarray) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    for value, mask in enumerate(masks, start=1):
        labels[mask] = value
    return labels


def pairs() -> Pairs:
    """Ellipsoids, plates and lines; a far single voxel; empty masks; masks at the border; noise."""
    rng = np.random.default_rng(0)
    big, small = (30, 26, 18), (16, 14, 11)
    none = np.zeros(big, bool)
    a = ellipsoid(big, (9, 8, 6), (6, 5.5, 4))
    b = ellipsoid(big, (20, 17, 10), (5, 6, 5))
    plate, line = none.copy(), none.copy()
    plate[4:22, 3:20, 15], line[3, 3:20, 2] = True, True
    far = ellipsoid(big, (10, 9, 6.4), (6, 5, 4.5))
    far[28, 24, 16] = True
    reference = stack(big, a, b, plate | line)
    shifted = stack(
        big, ellipsoid(big, (9.6, 8, 6.5), (5.5, 6, 4)), np.roll(b, (2, 1, 1), (0, 1, 2)), np.roll(plate, 2, 1)
    )
    noise = rng.random((2, *small))
    smooth = [sum(np.roll(field, n, axis) for axis in range(3) for n in (-1, 0, 1)) / 9 for field in noise]
    rough = [np.digitize(field, (0.42, 0.5, 0.58)).astype(np.uint8) for field in smooth]
    whole = np.ones(small, np.uint8)
    whole[4:9, 3:8, 2:7] = 2
    border = whole.copy()
    border[:3], border[:, -2:, 5:] = 0, 3
    return {
        "shifted": (shifted, reference, (0.8, 0.8, 3.0)),
        "outlier": (stack(big, far, b, line), reference, (1.5, 0.7, 2.2)),
        "equal": (reference, reference, (0.9, 0.9, 2.5)),
        "empty_prediction": (stack(big, none, b, none), reference, (0.8, 0.8, 3.0)),
        "empty_reference": (reference, stack(big, a, none, none), (1.0, 1.2, 5.0)),
        "both_empty": (stack(big, a, none, none), stack(big, np.roll(a, 1, 0), none, none), (0.8, 0.8, 3.0)),
        "noise": (rough[0], rough[1], (0.6, 1.1, 2.3)),
        "border": (border, whole, (0.8, 0.8, 3.0)),
    }


def by_monai(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, np.ndarray]:
    import torch
    from monai import metrics

    both = [
        torch.from_numpy(np.stack([labels == value for value in (0, *CLASSES)])[None].astype(np.float32))
        for labels in (prediction, reference)
    ]
    found = {"dice": metrics.compute_dice(*both, include_background=False)}
    space = {"include_background": False, "spacing": list(spacing)}
    found["hd95"] = metrics.compute_hausdorff_distance(*both, percentile=95, **space)
    found["hd"] = metrics.compute_hausdorff_distance(*both, **space)
    found["assd"] = metrics.compute_average_surface_distance(*both, symmetric=True, **space)
    for tolerance in TOLERANCES:
        limits = [tolerance] * len(CLASSES)
        found[f"nsd_{tolerance}"] = metrics.compute_surface_dice(*both, limits, **space)
        found[f"nsd_{tolerance}_subvoxels"] = metrics.compute_surface_dice(*both, limits, use_subvoxels=True, **space)
    return {name: np.asarray(values, np.float64).ravel() for name, values in found.items()}


def by_surface_distance(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]
) -> dict[str, np.ndarray]:
    # Version 0.1 is written for a NumPy that had these names.
    for name, value in (("Inf", np.inf), ("NaN", np.nan)):
        setattr(np, name, value)
    import surface_distance as package

    rows = []
    for value in CLASSES:
        predicted, wanted = prediction == value, reference == value
        found = package.compute_surface_distances(wanted, predicted, spacing)
        to_prediction, to_reference = package.compute_average_surface_distance(found)
        row = {
            "dice": package.compute_dice_coefficient(wanted, predicted),
            "hd95": package.compute_robust_hausdorff(found, 95),
            "hd": package.compute_robust_hausdorff(found, 100),
            "asd_prediction_to_reference": to_reference,
            "asd_reference_to_prediction": to_prediction,
        }
        for tolerance in TOLERANCES:
            row[f"nsd_{tolerance}"] = package.compute_surface_dice_at_tolerance(found, tolerance)
        rows.append(row)
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def main() -> None:
    warnings.simplefilter("ignore")
    content: dict[str, np.ndarray] = {}
    for name, (prediction, reference, spacing) in pairs().items():
        content |= {f"{name}/prediction": prediction, f"{name}/reference": reference}
        content[f"{name}/spacing"] = np.array(spacing)
        for package, function in (("monai", by_monai), ("surface_distance", by_surface_distance)):
            for metric, values in function(prediction, reference, spacing).items():
                content[f"{name}/{package}/{metric}"] = values
    packages = ("monai", "torch", "surface-distance", "numpy", "scipy")
    content["versions"] = np.array([f"{package} {importlib.metadata.version(package)}" for package in packages])
    np.savez_compressed(Path(__file__).with_name("surfaces.npz"), **content)


if __name__ == "__main__":
    main()
