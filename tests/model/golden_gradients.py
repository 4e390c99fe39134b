"""Gradients beside those of a golden: norms and sums of all tensors, and some of them whole."""

import numpy as np


def compare_gradients(gradients, data, which, exact_zero, bound, zero):
    """gradients: published name -> array. exact_zero: which tensors have none; they are below `zero` here."""
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in data["grad_names"]]
    assert set(gradients) == set(names)
    norms, sums = (data[f"{which}/{key}"] for key in ("grad_l2", "grad_sum"))
    for name, norm, total, is_zero in zip(names, norms, sums, exact_zero, strict=True):
        got = np.asarray(gradients[name], np.float64)
        if is_zero:
            assert np.abs(got).max() < zero, name
            continue
        assert abs(np.linalg.norm(got) - norm) <= bound * norm, name
        assert abs(got.sum() - total) <= bound * norm * np.sqrt(got.size), name
        if f"{which}/grad/{name}" in data:
            assert np.linalg.norm(got - data[f"{which}/grad/{name}"]) <= bound * norm, name
