"""Which files make a case, one module a layout. Imports without jax."""

from mambahome_jax.datasets.base import Case, Dataset
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, split_cases, write_prepared
from mambahome_jax.datasets.registry import load_dataset

__all__ = [
    "Case",
    "Dataset",
    "Prepared",
    "PreparedCase",
    "load_dataset",
    "read_prepared",
    "split_cases",
    "write_prepared",
]
