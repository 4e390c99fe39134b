import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate

from mambahome_jax.errors import ConfigError
from mambahome_jax.inference import tiled
from mambahome_jax.inference.sliding_window import sliding_window
from mambahome_jax.inference.tiled import importance_map, window_size, window_starts
from tests.conftest import load_golden

GOLDEN = "pipeline/sliding_window.npz"
CONFIGS = range(12)


def convolution(weight, bias, factor=1.0):
    """Predictor in NumPy: correlation with zero padding at the window's border, times a factor per voxel."""

    def predict(windows):
        windows = np.asarray(windows, np.float64)
        planes = [
            [sum(correlate(w[..., i], k[i], mode="constant") for i in range(k.shape[0])) + b for w in windows]
            for k, b in zip(weight, bias, strict=True)
        ]
        return np.moveaxis(np.array(planes), 0, -1) * factor

    return predict


def ramp(a, roi):
    i, j, k = np.ogrid[tuple(slice(0, r) for r in roi)]
    first = 1 + a[0] * i / roi[0] - a[1] * j / roi[1] + a[2] * k / roi[2]
    second = (1 + a[3] * i / roi[0]) * (1 + a[4] * j / roi[1]) * (1 - a[5] * k / roi[2])
    return np.stack([first, second], axis=-1)


@pytest.mark.parametrize("memory", ["device", "host"])
@pytest.mark.parametrize("number", CONFIGS)
def test_equals_monai(number, memory):
    golden = load_golden(GOLDEN)
    config = json.loads(str(golden["configs_json"]))[number]
    x = np.moveaxis(golden[f"x/{config['x']}"], 1, -1)
    roi = window_size(x.shape[1:4], config["roi"])
    factor = ramp(golden["predictor/ramp_a"], roi) if config["pred"] == "ramp" else 1.0
    calls = []

    def predict(windows):
        calls.append(windows.shape)
        return convolution(golden["predictor/weight"], golden["predictor/bias"], factor)(windows)

    for image, expected in zip(x, golden[f"cfg{number}/out"], strict=True):
        result = sliding_window(
            predict,
            image,
            config["roi"],
            config["overlap"],
            config["mode"],
            config["sw"],
            "edge" if config["pad"] == "replicate" else "constant",
            config["sigma"],
            padding_value=config["cval"],
            accumulate_on=memory,
        )
        assert isinstance(result, jax.Array if memory == "device" else np.ndarray)
        np.testing.assert_allclose(result, np.moveaxis(expected, 0, -1), rtol=0, atol=1e-4)
    assert set(calls) == {(config["sw"], *roi, 1)}
    starts = window_starts(config["padded_size"], roi, config["overlap"])
    np.testing.assert_array_equal(starts, golden[f"cfg{number}/starts"])
    if config["mode"] == "gaussian":
        np.testing.assert_allclose(
            importance_map(roi, "gaussian", config["sigma"]), golden[f"cfg{number}/importance"], rtol=1e-5
        )


@pytest.mark.parametrize("case", ["sw_a", "sw_b"])
def test_equals_the_published_windows_in_float64(case, x64):
    golden = load_golden("layers_tiny.npz")
    predict = convolution(golden["sw/weight"], golden["sw/bias"], np.moveaxis(golden["sw/pos"], 0, -1))
    image = np.moveaxis(golden[f"{case}/x"][0], 0, -1).astype(np.float64)
    result = sliding_window(predict, image, (24, 16, 8), sw_batch_size=3)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, np.moveaxis(golden[f"{case}/out"][0], 0, -1), rtol=0, atol=1e-6)


def test_starts_of_the_table():
    for row in json.loads(str(load_golden(GOLDEN)["starts_table_json"])):
        assert window_starts((row["image"],), (row["roi"],), row["overlap"])[:, 0].tolist() == row["starts"]


@pytest.mark.parametrize("number", range(5))
def test_gaussian_maps(number):
    golden = load_golden(GOLDEN)
    roi, scale = golden[f"map{number}/roi"].tolist(), golden[f"map{number}/sigma_scale"].tolist()
    result = importance_map(roi, "gaussian", scale)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, golden[f"map{number}/importance"], rtol=1e-5)


@settings(max_examples=8)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.integers(-1, 9)] * 3),
    st.floats(0, 0.9),
    st.integers(1, 5),
    st.sampled_from(["gaussian", "constant"]),
    st.sampled_from(["edge", "constant"]),
)
def test_pointwise_function_comes_back_unchanged(shape, roi, overlap, batch, mode, padding):
    image = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    result = sliding_window(lambda x: 2 * np.asarray(x) + 1, image, roi, overlap, mode, batch, padding)
    np.testing.assert_allclose(result, 2 * image + 1, rtol=0, atol=1e-5)


def test_one_compilation_for_volumes_of_all_sizes():
    traces = []

    @jax.jit
    def predict(x):
        traces.append(x.shape)
        return jnp.concatenate([x, -x], axis=-1)

    for shape in ((9, 8, 7), (20, 5, 11), (3, 3, 3)):
        assert sliding_window(predict, np.zeros((*shape, 1), np.float32), (8, 8, 8)).shape == (*shape, 2)
    assert traces == [(4, 8, 8, 8, 1)]


def test_half_precision_predictions_are_summed_in_float32():
    result = sliding_window(lambda x: x.astype(jnp.bfloat16), np.full((6, 6, 6, 1), 1.25, np.float64), (4, 4, 4))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, 1.25, rtol=1e-6)


def test_sums_that_do_not_fit_the_device_go_to_the_host(monkeypatch):
    image = np.random.default_rng(1).normal(size=(10, 9, 8, 1)).astype(np.float32)
    on_device = sliding_window(lambda x: x * x, image, (4, 4, 4))
    monkeypatch.setattr(tiled, "UNKNOWN_DEVICE_BUDGET", 1000)
    on_host = sliding_window(lambda x: x * x, image, (4, 4, 4))
    assert isinstance(on_device, jax.Array)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_allclose(on_host, on_device, rtol=0, atol=1e-6)


def test_progress_counts_windows():
    seen = []
    sliding_window(lambda x: x, np.zeros((9, 4, 4, 1), np.float32), 4, progress=lambda *n: seen.append(n))
    assert seen == [(4, 4)]
    sliding_window(lambda x: x, np.zeros((16, 4, 4, 1), np.int16), 4, progress=lambda *n: seen.append(n))
    assert seen[1:] == [(4, 7), (7, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4, 4))}, "image has shape"),
        ({"image": np.zeros((4, 0, 4, 1))}, "none of them 0"),
        ({"roi_size": (4, 4)}, "roi_size is"),
        ({"roi_size": (4, 4, 2.5)}, "a sequence of int"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"overlap": float("nan")}, "overlap is nan"),
        ({"overlap": (0.5, 0.5)}, "overlap is"),
        ({"mode": "cubic"}, "'gaussian' or 'constant'"),
        ({"padding_mode": "reflect"}, "'edge' or 'constant'"),
        ({"sw_batch_size": 0}, "sw_batch_size is 0"),
        ({"sigma_scale": 0}, "sigma_scale is 0"),
        ({"accumulate_on": "disk"}, "'device' or 'host'"),
        ({"predict": lambda x: x[..., 0]}, "predict gave shape"),
        ({"predict": lambda x: x[:, 1:]}, "predict gave shape"),
    ],
)
def test_says_what_is_wrong(change, message):
    arguments = {"predict": lambda x: x, "image": np.zeros((4, 4, 4, 1)), "roi_size": 4} | change
    with pytest.raises(ConfigError, match=message):
        sliding_window(**arguments)
