"""Kernels are made anew in each test, as some look at what that leaves behind."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_program_cache(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
