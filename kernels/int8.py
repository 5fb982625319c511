"""What lies between the int8 matrix products of an encoder, compiled: dequantising, attention, GELU, norms, quantising.

A row x of activations is kept as int8 q with x = scale · q + shift, scale and shift its own, so that no row depends on
another. A product's int32 sums become numbers by w · (scale · sum + shift · column) + bias, w the scale of the weight's
column and `column` the sum of its int8 values. Each kernel ends by quantising its result for the next product, channel
by channel divided by what the next weight was multiplied with (SmoothQuant, arXiv 2211.10438).
"""

from typing import Any

import numpy as np
from numba import njit

from .vectors16 import LANES, ROWS, highest, lowest, multiplied, softmax

LOG2E = np.float32(1.4426950408889634)


def compiled(function: Any) -> Any:
    """Compiled without the GIL, the machine code cached where there is a folder for it."""
    options: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to cache in
        return njit(**options)(function)


@compiled
def _quantise(values, inverse, q):  # type: ignore[no-untyped-def]
    """The row `values` (changed: channels divided), of whole LANES, into the row q; its scale and shift."""
    for c in range(values.size):
        values[c] *= inverse[c]
    low = lowest(values.ctypes.data, values.size // LANES)
    high = highest(values.ctypes.data, values.size // LANES)
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
def attend(sums, scale, shift, w, column, bias, starts, heads, inverse, q, scale_out, shift_out):  # type: ignore[no-untyped-def]
    """Attention within each text (starts[i] to starts[i + 1]) over the product of fused queries, keys and values,
    quantised. The width of a head is a multiple of LANES."""
    size = sums.shape[1] // 3
    wide = size // heads
    longest = 1
    for text in range(starts.size - 1):
        longest = max(longest, starts[text + 1] - starts[text])
    rows = (longest + ROWS - 1) // ROWS * ROWS
    lanes = (longest + LANES - 1) // LANES * LANES
    told, context = np.zeros((rows, 3 * size), np.float32), np.empty((rows, size), np.float32)
    keys = np.zeros((lanes // LANES, wide, LANES), np.float32)  # of LANES tokens, channel by channel
    values = np.empty((wide // LANES, lanes, LANES), np.float32)  # LANES channels of each token: rows of `told` collide
    scores = np.empty((ROWS, lanes), np.float32)
    here, mixed, key, score = told.ctypes.data, context.ctypes.data, keys.ctypes.data, scores.ctypes.data
    row, out = 12 * size, 4 * size  # bytes of a row of told, of context
    factor = LOG2E / np.float32(np.sqrt(wide))
    for text in range(starts.size - 1):
        start = starts[text]
        length = starts[text + 1] - start
        blocks = (length + LANES - 1) // LANES
        for i in range(length):
            _told(sums[start + i], scale[start + i], shift[start + i], w, column, bias, told[i])
        for head in range(heads):
            at = head * wide
            _turned(told[:length, size + at : size + at + wide], factor, keys)
            for part in range(wide // LANES):
                first = 2 * size + at + part * LANES
                values[part, :length] = told[:length, first : first + LANES]
            for i in range(0, length, ROWS):
                queries = here + i * row + 4 * at
                for block in range(blocks):
                    multiplied(
                        queries, row, key + 4 * LANES * wide * block, 4 * LANES, score + 4 * LANES * block,
                        4 * lanes, wide,
                    )  # fmt: skip
                for part in range(ROWS):
                    for j in range(length, blocks * LANES):
                        scores[part, j] = np.float32(-1e30)
                    softmax(score + 4 * lanes * part, blocks)
                for part in range(wide // LANES):
                    multiplied(
                        score, 4 * lanes, values.ctypes.data + 4 * LANES * lanes * part, 4 * LANES,
                        mixed + i * out + 4 * (at + part * LANES), out, length,
                    )  # fmt: skip
        for i in range(length):
            scale_out[start + i], shift_out[start + i] = _quantise(context[i], inverse, q[start + i])


@compiled
def _turned(rows, factor, keys):  # type: ignore[no-untyped-def]
    """Keys, times `factor`, by LANES tokens and channel."""
    for i in range(rows.shape[0]):
        block = keys[i // LANES]
        lane = i % LANES
        row = rows[i]
        for c in range(row.size):
            block[c, lane] = row[c] * factor
