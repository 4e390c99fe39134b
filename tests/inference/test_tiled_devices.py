"""What is compiled, and where windows are predicted and added."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mambahome_jax.errors import ConfigError
from mambahome_jax.imaging.normalisation import CtWindow
from mambahome_jax.inference import tiled
from mambahome_jax.inference.segment import SegmentSettings, label, segment, to_network_grid
from tests.inference.models import Levels
from tests.inference.test_tiled import MIRRORS, ROI, network, scan


@pytest.fixture
def compiled():
    """Every compilation from here on."""
    found = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def test_volumes_of_other_sizes_compile_nothing(compiled):
    models = [network(0), network(1)]

    def run(chain, shape, orientation="RAS", spacing=(1.0, 1.2, 2.0)):
        # Five windows a call, as in no other test: the first volume must compile.
        settings = SegmentSettings((1.3, 1.1, 1.6), "RAS", CtWindow(), ROI, 0.5, 5, chain, MIRRORS)
        prepared = to_network_grid(scan(shape, orientation, spacing), settings)
        label(models, prepared, with_probabilities=kept.append)

    kept = []
    # Long enough that tiles are used again.
    run("trained", (20, 33, 70))
    first = len(compiled)
    assert first > 0
    run("trained", (31, 18, 26))
    run("trained", (12, 40, 21), "PSR", (0.7, 2.2, 1.4))
    run("published", (60, 19, 22))
    assert len(compiled) == first
    assert len({share.shape for share in kept}) == 4


@pytest.mark.parametrize("count", [2, 3])
def test_devices_share_the_windows_and_give_the_labels_of_one(count):
    devices = jax.local_devices()[:count]
    assert len(devices) == count, "tests/conftest.py asks for eight"
    settings = SegmentSettings((1.3, 1.1, 1.6), "RAS", CtWindow(), ROI, 0.5, 2, "trained", MIRRORS)
    models, prepared = [network(0), network(1)], to_network_grid(scan((41, 33, 30)), settings)
    alone, spread = [], []
    one = label(models, prepared, with_probabilities=alone.append)
    several = label(models, prepared, with_probabilities=spread.append, devices=devices)
    np.testing.assert_array_equal(several.array, one.array)
    np.testing.assert_array_equal(spread[0], alone[0])


def test_every_device_predicts(monkeypatch):
    seen = []
    add = tiled.Tiles.add

    def noted(self, predicted, corners):
        seen.append((predicted.devices().pop(), self.device))
        return add(self, predicted, corners)

    monkeypatch.setattr(tiled.Tiles, "add", noted)
    devices = jax.local_devices()[1:3]
    segment(Levels((0.0, 1.0)), scan((40, 30, 30)), roi_size=(16, 16, 16), devices=devices)
    assert {device for device, _ in seen} == set(devices)
    assert {device for _, device in seen} == {devices[0]}
    seen.clear()
    settings = SegmentSettings(None, "RAS", CtWindow(), ROI)
    label(network(0), to_network_grid(scan((20, 20, 20)), settings), devices=devices, device_bytes=0)
    assert {device for _, device in seen} == {jax.local_devices(backend="cpu")[0]}


def test_predictions_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match="predict gave shape"):
        segment(lambda windows: windows[..., 0], scan((20, 20, 20)), roi_size=(16, 16, 16))


def test_what_fails_while_windows_are_cut_is_raised():
    prepared = to_network_grid(scan((20, 20, 40)), SegmentSettings(None, "RAS", CtWindow(), ROI))

    class Broken:
        def __getattr__(self, name):
            return getattr(prepared, name)

        def slab(self, axis, start, stop):
            raise MemoryError

    with pytest.raises(MemoryError):
        label(network(0), Broken())


def test_a_call_holds_no_more_windows_than_a_scan_has(monkeypatch):
    settings = SegmentSettings((1.3, 1.1, 1.6), "RAS", CtWindow(), ROI, 0.5, 4)
    prepared = to_network_grid(scan((31, 33, 30)), settings)
    expected, original, calls = label(network(0), prepared).array, tiled.Tiles.add, []

    def add(self, predicted, corners):
        calls.append((len(predicted), len(corners)))
        return original(self, predicted, corners)

    monkeypatch.setattr(tiled.Tiles, "add", add)
    many = replace(prepared, settings=replace(settings, sw_batch_size=1_000_000))
    assert (label(network(0), many).array == expected).mean() > 0.999
    ((stacked, windows),) = calls
    assert windows <= stacked <= 32


@pytest.mark.parametrize(
    ("failing", "told"), [(1, ["2 in a call"]), (3, ["2 in a call", "1 in a call", "sums on the host"])]
)
def test_less_memory_gives_the_same_labels(monkeypatch, failing, told):
    settings = SegmentSettings((1.3, 1.1, 1.6), "RAS", CtWindow(), ROI, 0.5, 4)
    models, prepared = [network(0), network(1)], to_network_grid(scan((31, 33, 30)), settings)
    expected = label(models, prepared).array
    original, places, lines, calls = tiled.Tiles.add, [], [], []

    def add(self, predicted, corners):
        calls.append(len(predicted))
        # The third time, when there are sums that begin anew.
        if len(lines) < failing and calls.count(calls[-1]) == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        places.append(self.device)
        return original(self, predicted, corners)

    monkeypatch.setattr(tiled.Tiles, "add", add)
    np.testing.assert_array_equal(label(models, prepared, say=lines.append).array, expected)
    assert [line.partition("trying ")[2] for line in lines] == told
