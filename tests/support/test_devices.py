"""Options for XLA: those that the version knows, and the user's own come first."""

import pytest

from mambahome_jax.support import devices


@pytest.fixture(autouse=True)
def fresh():
    devices.compiler_options.cache_clear()
    yield
    devices.compiler_options.cache_clear()


def test_options_that_this_version_does_not_know_are_left_out(monkeypatch):
    known = {"xla_backend_optimization_level": "1"}
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": known | {"xla_no_such_option": True}})
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices.compiler_options() == known


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": {"xla_backend_optimization_level": "1"}})
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert devices.compiler_options() == {}


def test_no_options_where_there_are_none(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"gpu": {"xla_no_such_option": True}})
    assert devices.compiler_options() == {}


def test_less_memory_is_a_matter_of_those_who_ask_for_it(monkeypatch):
    monkeypatch.setattr(devices, "_OPTIONS", {"cpu": {"xla_backend_optimization_level": "1"}})
    monkeypatch.setattr(devices, "_LESS_MEMORY", {"cpu": {"xla_gpu_enable_latency_hiding_scheduler": False}})
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices.compiler_options() == {"xla_backend_optimization_level": "1"}
    assert devices.compiler_options(less_memory=True)["xla_gpu_enable_latency_hiding_scheduler"] is False
