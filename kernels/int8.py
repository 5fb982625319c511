"""What lies between the int8 matrix products of an encoder, compiled: dequantising, GELU, norms, quantising.

A row x of activations is kept as int8 q with x = scale · q + shift, scale and shift its own, so that no row depends on
another. A product's int32 sums become numbers by w · (scale · sum + shift · column) + bias, w the scale of the weight's
column and `column` the sum of its int8 values. Each kernel ends by quantising its result for the next product, channel
by channel divided by what the next weight was multiplied with (SmoothQuant, arXiv 2211.10438).
"""

from typing import Any

import numpy as np
from numba import njit


def compiled(function: Any) -> Any:
    return njit(nogil=True, cache=True, fastmath=True, error_model="numpy")(function)


@compiled
def _quantise(values, inverse, q):  # type: ignore[no-untyped-def]
    """The row `values` (changed: channels divided) into the row q; its scale and shift."""
    low = high = values[0] * inverse[0]
    for c in range(values.size):
        value = values[c] * inverse[c]
        values[c] = value
        low = value if value < low else low
        high = value if value > high else high
    step = (high - low) / np.float32(255.0)
    step = step if step > np.float32(1e-20) else np.float32(1e-20)
    per = np.float32(1.0) / step
    for c in range(values.size):
        q[c] = np.int8(np.int32((values[c] - low) * per + np.float32(0.5)) - np.int32(128))
    return step, low + np.float32(128.0) * step


@compiled
def _told(sums, scale, shift, w, column, bias, values):  # type: ignore[no-untyped-def]
    """The row `values` that the int32 row `sums` stands for."""
    for c in range(sums.size):
        values[c] = np.float32(sums[c]) * (scale * w[c]) + shift * column[c] + bias[c]


@compiled
def quantise(hidden, inverse, q, scale, shift):  # type: ignore[no-untyped-def]
    values = np.empty(hidden.shape[1], np.float32)
    for row in range(hidden.shape[0]):
        values[:] = hidden[row]
        scale[row], shift[row] = _quantise(values, inverse, q[row])


@compiled
def add_norm(sums, scale, shift, w, column, bias, hidden, gain, offset, eps, inverse, q, scale_out, shift_out):  # type: ignore[no-untyped-def]
    """hidden <- norm(product + hidden), and quantised."""
    size = hidden.shape[1]
    values = np.empty(size, np.float32)
    for row in range(hidden.shape[0]):
        _told(sums[row], scale[row], shift[row], w, column, bias, values)
        state = hidden[row]
        total = np.float32(0.0)
        for c in range(size):
            values[c] += state[c]
            total += values[c]
        mean = total / np.float32(size)
        square = np.float32(0.0)
        for c in range(size):
            square += (values[c] - mean) * (values[c] - mean)
        factor = np.float32(1.0) / np.sqrt(square / np.float32(size) + eps)
        for c in range(size):
            value = (values[c] - mean) * factor * gain[c] + offset[c]
            state[c] = value
            values[c] = value
        scale_out[row], shift_out[row] = _quantise(values, inverse, q[row])


@compiled
def gelu(sums, scale, shift, w, column, bias, inverse, q, scale_out, shift_out):  # type: ignore[no-untyped-def]
    """The exact GELU of a product, quantised; erf by a rational function, within 3e-7."""
    values = np.empty(sums.shape[1], np.float32)
    for row in range(sums.shape[0]):
        _told(sums[row], scale[row], shift[row], w, column, bias, values)
        _gelu(values)
        scale_out[row], shift_out[row] = _quantise(values, inverse, q[row])


@compiled
def _gelu(values):  # type: ignore[no-untyped-def]
    for c in range(values.size):
        x = values[c]
        z = x * np.float32(0.7071067811865476)
        z = z if z < np.float32(4.0) else np.float32(4.0)
        z = z if z > np.float32(-4.0) else np.float32(-4.0)
        y = z * z
        above = np.float32(-2.72614225801306e-10)
        above = above * y + np.float32(2.77068142495902e-08)
        above = above * y + np.float32(-2.10102402082508e-06)
        above = above * y + np.float32(-5.69250639462346e-05)
        above = above * y + np.float32(-7.34990630326855e-04)
        above = above * y + np.float32(-2.95459980854025e-03)
        above = above * y + np.float32(-1.60960333262415e-02)
        below = np.float32(-1.45660718464996e-05)
        below = below * y + np.float32(-2.13374055278905e-04)
        below = below * y + np.float32(-1.68282697438203e-03)
        below = below * y + np.float32(-7.37332916720468e-03)
        below = below * y + np.float32(-1.42647390514189e-02)
        values[c] = np.float32(0.5) * x * (np.float32(1.0) + z * above / below)


@compiled
def told(sums, scale, shift, w, column, bias, values):  # type: ignore[no-untyped-def]
    """values <- the product's numbers."""
    for row in range(sums.shape[0]):
        _told(sums[row], scale[row], shift[row], w, column, bias, values[row])
