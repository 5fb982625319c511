"""The kernels between int8 products against torch in fp32."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gristmill.kernels import int8

DRAW = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32)


def product(rows: int, size: int) -> tuple[tuple[np.ndarray, ...], torch.Tensor]:
    """(sums, scale, shift, w, column, bias) and the numbers that they stand for, of about unit size."""
    sums = DRAW.integers(-2000, 2000, (rows, size)).astype(np.int32)
    parts = (DRAW.random(rows) * 0.1).astype(np.float32), floats(rows), (DRAW.random(size) * 0.02).astype(np.float32)
    scale, shift, w = parts
    column, bias = floats(size), floats(size)
    told = w * (scale[:, None] * sums) + shift[:, None] * column + bias
    return (sums, scale, shift, w, column, bias), torch.from_numpy(told).float()


def out(rows: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty((rows, size), np.int8), np.empty(rows, np.float32), np.empty(rows, np.float32)


def restored(made: tuple[np.ndarray, np.ndarray, np.ndarray], inverse: np.ndarray) -> np.ndarray:
    q, scale, shift = made
    return (q * scale[:, None] + shift[:, None]) / inverse


def check(made: tuple[np.ndarray, np.ndarray, np.ndarray], inverse: np.ndarray, want: np.ndarray) -> None:
    """Each number is within half a step (and rounding) of what it should be; a row's extremes are -128 and 127."""
    gap = np.abs(restored(made, inverse) - want) * inverse / made[1][:, None]
    assert gap.max() < 0.501 + 1e-3
    assert (made[0].min(axis=1) == -128).all() and (made[0].max(axis=1) == 127).all()


@pytest.mark.parametrize(("lengths", "heads", "size"), [([1, 1, 2, 5, 16, 17, 33, 70], 3, 48), ([7, 7, 64], 2, 64)])
def test_attention(lengths: list[int], heads: int, size: int) -> None:
    rows = sum(lengths)
    given, told = product(rows, 3 * size)
    inverse = (DRAW.random(size) + 0.5).astype(np.float32)
    made = out(rows, size)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    int8.attend(*given, starts, heads, inverse, *made)
    want = []
    for start, end in itertools.pairwise(starts):
        query, key, value = told[start:end].view(-1, 3, heads, size // heads).permute(1, 2, 0, 3)
        want.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1).reshape(-1, size))
    check(made, inverse, torch.cat(want).numpy())
    alone = out(lengths[-1], size)
    last = tuple(part[-lengths[-1] :] if len(part) == rows else part for part in given)
    int8.attend(*last, np.array([0, lengths[-1]]), heads, inverse, *alone)
    for one, other in zip(alone, made, strict=True):
        assert np.array_equal(one, other[-lengths[-1] :]), "to the last bit, whatever lies beside it"


def test_gelu() -> None:
    given, told = product(50, 96)
    inverse = (DRAW.random(96) + 0.5).astype(np.float32)
    made = out(50, 96)
    int8.gelu(*given, inverse, *made)
    check(made, inverse, F.gelu(told).numpy())
    wide = torch.linspace(-9, 9, 20_000)
    values = wide.numpy().copy()
    int8._gelu(values)
    assert np.abs(values - F.gelu(wide.double()).numpy()).max() < 2e-6


def test_sum_and_norm() -> None:
    given, told = product(40, 64)
    hidden, gain, offset = floats(40, 64), floats(64), floats(64)
    want = F.layer_norm(told + torch.from_numpy(hidden), (64,), torch.from_numpy(gain), torch.from_numpy(offset), 1e-5)
    inverse = (DRAW.random(64) + 0.5).astype(np.float32)
    made = out(40, 64)
    int8.add_norm(*given, hidden, gain, offset, np.float32(1e-5), inverse, *made)
    assert np.abs(hidden - want.numpy()).max() < 1e-4
    check(made, inverse, hidden)


def test_a_constant_row_is_quantised_exactly() -> None:
    made = out(2, 32)
    int8.quantise(np.array([[0.0] * 32, [3.5] * 32], np.float32), np.ones(32, np.float32), *made)
    assert np.allclose(restored(made, np.ones(32)), [[0.0], [3.5]])
