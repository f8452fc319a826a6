"""What the tests say if an answer is wrong."""
import math

import numpy as np
import torch


def plain(value):
    """Return a float or an array of floats from a number, list, array or tensor."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    array = np.asarray(value, dtype=float)
    return array if array.ndim else float(array)


def near(got, expected, what, tolerance=1e-6, hint="", least=1.0):
    """Require got to be expected, up to tolerance x the larger of |expected| and `least`.

    what, hint  name the quantity and say how it comes about, for the message
    """
    __tracebackhide__ = True
    got, expected = plain(got), plain(expected)
    ending = f" ({hint})" if hint else ""
    assert np.shape(got) == np.shape(expected), (
        f"{what}: expected {short(expected)}, of shape {np.shape(expected)}, got the shape "
        f"{np.shape(got)}{ending}")
    error = np.abs(np.subtract(got, expected))
    assert np.all(error <= tolerance * np.maximum(least, np.abs(expected))), (
        f"{what}: expected {short(expected)}, got {short(got)}{ending}")


def near_ratio(got, expected, what, tolerance=1e-6, hint=""):
    """Require got / expected to be 1 within a tolerance: for numbers that may be small."""
    __tracebackhide__ = True
    near(got, expected, what, tolerance, hint, least=0.0)


def short(value):
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.6g}"
    return np.array2string(value, precision=6, threshold=12)


def raises_value_error(call, what):
    """Require call() to raise ValueError."""
    __tracebackhide__ = True
    try:
        got = call()
    except ValueError:
        return
    raise AssertionError(f"{what}: expected a ValueError, got {got}")
