"""Which files make a case, one module a layout. Imports without jax."""

from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import join_datasets, merge_structures, select_structures

__all__ = [
    "Case",
    "Dataset",
    "Prepared",
    "PreparedCase",
    "join_datasets",
    "load_dataset",
    "merge_structures",
    "read_prepared",
    "select_structures",
    "split_cases",
    "write_prepared",
]
