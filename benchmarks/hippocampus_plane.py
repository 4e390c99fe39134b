"""Where predictions put the plane between anterior (1) and posterior (2) hippocampus, against the references.

python benchmarks/hippocampus_plane.py --references LABELS --predictions PRED_A PRED_B

The references draw it along one slice of the second axis. The plane of a label map lies at the first slice with a
structure plus the posterior share of each slice from there on. Of each folder: mean and standard deviation of the
error in voxels, and the share of cases within half and one and a half of them; then the correlations of the errors.
"""

import argparse
from pathlib import Path

import numpy as np

from mambahome_jax.imaging.volume import read_labels


def plane(path: Path) -> float:
    """Position along the second axis, in voxels; raises ValueError where a part is missing."""
    labels = read_labels(path).array
    anterior, posterior = ((labels == value).sum(axis=(0, 2)) for value in (1, 2))
    if not anterior.any() or not posterior.any():
        raise ValueError(f"{path}: expected the labels 1 and 2")
    slices = np.flatnonzero(anterior + posterior)
    here = slice(slices[0], slices[-1] + 1)
    shares = posterior[here] / np.maximum(anterior[here] + posterior[here], 1)
    return float(slices[0] + shares.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    names = [{path.name for path in folder.glob("*.nii.gz")} for folder in args.predictions]
    cases = sorted(set.intersection(*names))
    references = np.array([plane(args.references / case) for case in cases])
    errors = np.array([[plane(folder / case) for case in cases] for folder in args.predictions]) - references
    for folder, error in zip(args.predictions, errors, strict=True):
        within = ", ".join(f"{np.mean(np.abs(error) < limit):.2f} within {limit}" for limit in (0.5, 1.5))
        print(f"{folder}: {len(cases)} cases, mean {error.mean():+.2f}, deviation {error.std():.2f}, {within}")
    if len(errors) > 1:
        print("correlations", np.round(np.corrcoef(errors), 2).tolist())


if __name__ == "__main__":
    main()
