"""Which files make a case, one module a layout. Imports without jax."""

from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.datasets.structures import join_datasets, merge_structures, mirror_table, select_structures

__all__ = [
    "Case",
    "Dataset",
    "Prepared",
    "PreparedCase",
    "join_datasets",
    "load_dataset",
    "merge_structures",
    "mirror_table",
    "read_prepared",
    "select_structures",
    "split_cases",
    "write_prepared",
]
