"""A chunk of logits between two matrix products, in Triton: one program a token, what logprob_chunk.py says.

The products themselves are cuBLAS's, which at V = 128,256 and H = 4,096 no kernel of ours would beat: 2.1 GFLOP a token
for logits and gradient, 3.0 µs at 700 TFLOP/s. Between them `fold` reads a row of logits (256 kB in bf16) from memory,
reads it again from the L2 cache (132 programs at work hold 34 MB of its 50) and writes the gradient over it: 0.13 µs at
4 TB/s, 4 % of the products. The sum of exponentials is online, so that a row is met twice and not three times.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits of a row at work at once: 16 a thread of 16 warps


@triton.jit
def _exact(hidden, head, row, target, width, BLOCK_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """The product of a token's state and its target's row of the head, in fp32."""
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, width, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        state = tl.load(hidden + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        weight = tl.load(head + target * width + at, mask=at < width, other=0.0).to(tl.float32)
        total += state * weight
    return tl.sum(total, axis=0)


@triton.jit
def _bent(y):  # type: ignore[no-untyped-def]
    """tanh(y), exact to fp32 near 0 and at both ends."""
    small = tl.abs(y) < 0.05  # there 2 sigmoid(2y) - 1 would cancel
    square = y * y
    series = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(small, series, 2.0 * tl.sigmoid(2.0 * y) - 1.0)


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    base, bias, at, words, target, exact, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Logits at columns `at` of a row (-inf past its end), and their slope by the products."""
    inside = at < words
    x = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(at == target, exact, x)
    if HAS_BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    slope = tl.full(x.shape, 1.0, tl.float32) * scale
    if HAS_CAP:
        bent = _bent(x * (1.0 / softcap))
        slope *= 1.0 - bent * bent
        x = bent * softcap
    return tl.where(inside, x, float("-inf")), slope


@triton.jit
def _target(  # type: ignore[no-untyped-def]
    base, hidden, head, targets, row, words, width, EXACT: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A token's target (-1 where it is outside the vocabulary: its value becomes NaN, no memory is touched) and the
    product there."""
    target = tl.load(targets + row).to(tl.int64)
    inside = (target >= 0) & (target < words)
    place = tl.where(inside, target, 0)
    exact = tl.load(base + place).to(tl.float32)
    if EXACT:
        exact = _exact(hidden, head, row, place, width, BLOCK_H)
    return tl.where(inside, target, -1), exact


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    products, hidden, head, targets, bias, values, lse, words, width, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EXACT: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    base = products + row * words
    target, exact = _target(base, hidden, head, targets, row, words, width, EXACT, BLOCK_H)
    highest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)  # a sum in each lane, added up once
    picked = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, _slope = _logits(base, bias, at, words, target, exact, scale, softcap, HAS_BIAS, HAS_CAP)
        new = tl.maximum(highest, tl.max(z, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # a block of -inf alone (masked words) adds nothing
        sums = sums * tl.exp(highest - shift) + tl.exp(z - shift)
        picked += tl.where(at == target, z, 0.0)
        highest = new
    total = highest + tl.log(tl.sum(sums, axis=0))
    value = tl.where(target >= 0, tl.sum(picked, axis=0) - total, float("nan"))
    tl.store(values + row, value)
    tl.store(lse + row, total)
    if WRITE:
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z, slope = _logits(base, bias, at, words, target, exact, scale, softcap, HAS_BIAS, HAS_CAP)
            gradient = (tl.where(at == target, 1.0, 0.0) - tl.exp(z - total)) * slope
            tl.store(base + at, gradient.to(products.dtype.element_ty), mask=at < words)


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    products, hidden, head, targets, bias, lse, of_target, of_share, words, width, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    base = products + row * words
    target, exact = _target(base, hidden, head, targets, row, words, width, EXACT, BLOCK_H)
    total = tl.load(lse + row)
    of_one = tl.load(of_target + row)
    of_all = tl.load(of_share + row)
    tl.debug_barrier()  # the load of the target's product above, before any thread writes there
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, slope = _logits(base, bias, at, words, target, exact, scale, softcap, HAS_BIAS, HAS_CAP)
        gradient = (tl.where(at == target, of_one, 0.0) + of_all * tl.exp(z - total)) * slope
        tl.store(base + at, gradient.to(products.dtype.element_ty), mask=at < words)


def _options(
    products: Tensor, hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float | None, block: int
) -> dict[str, Any]:
    for name, tensor in (("hidden", hidden), ("head", head), ("products", products)):
        if tensor.stride(-1) != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    block = min(block, triton.next_power_of_2(products.shape[1]))
    return {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": softcap is not None,
        "EXACT": products.element_size() == 2,
        "BLOCK": block,
        "BLOCK_H": min(1024, triton.next_power_of_2(hidden.shape[1])),
        "num_warps": max(1, min(16, block // 512)),
    }


def fold(
    products: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    values: Tensor,
    lse: Tensor,
    write: bool,
    block: int = BLOCK,
) -> None:
    """logprob_chunk.fold. products, hidden and head are contiguous; values and lse fp32."""
    options = _options(products, hidden, head, bias, softcap, block)
    with torch.cuda.device(products.get_device()):
        _fold[(products.shape[0],)](
            products, hidden, head, targets, products if bias is None else bias, values, lse,
            products.shape[1], hidden.shape[1], scale, softcap or 1.0, WRITE=write, **options,
        )  # fmt: skip


def spread(
    products: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    lse: Tensor,
    of_target: Tensor,
    of_share: Tensor,
    block: int = BLOCK,
) -> None:
    """logprob_chunk.spread. lse, of_target and of_share: fp32, contiguous."""
    options = _options(products, hidden, head, bias, softcap, block)
    with torch.cuda.device(products.get_device()):
        _spread[(products.shape[0],)](
            products, hidden, head, targets, products if bias is None else bias, lse, of_target, of_share,
            products.shape[1], hidden.shape[1], scale, softcap or 1.0, **options,
        )  # fmt: skip
