"""Root mean square norm and its backward as one Triton kernel each (rms_norm.py is the door). Arithmetic in fp32.

A program holds whole rows: one of a wide norm, several of a narrow one (heads), TILE numbers in all. Forward reads x
and writes y; backward reads x and the gradient of y and writes that of x, where separate operations pass over memory
some 8 and 14 times. The weight's gradient is summed by each program over its rows, then over programs by torch: no
atomics, so that it comes out the same each time.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
WAVES = 4  # programs for each multiprocessor in the backward


@triton.jit
def _factor(weight, column, inside, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return w + 1.0 if SHIFTED else w


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, weight, y, inverse, n, width, eps,
    ROUNDED: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row[:, None] * width + column[None, :]
    inside = (row < n)[:, None] & (column < width)[None, :]
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / width + eps)
    tl.store(inverse + row, scale, mask=row < n)
    hat = wide * scale[:, None]
    if ROUNDED:
        hat = hat.to(x.dtype.element_ty).to(tl.float32)
    factor = _factor(weight, column, column < width, SHIFTED)
    tl.store(y + place, (hat * factor[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, x, weight, inverse, dx, dweight, n, width,
    SHIFTED: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    factor = _factor(weight, column, column < width, SHIFTED)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        place = row[:, None] * width + column[None, :]
        inside = (row < n)[:, None] & (column < width)[None, :]
        scale = tl.load(inverse + row, mask=row < n, other=0.0)[:, None]
        hat = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        dhat = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        if WANT_WEIGHT:
            total += tl.sum(dhat * hat, 0)
        if WANT_X:
            dhat = dhat * factor[None, :]
            mean = tl.sum(dhat * hat, 1) / width
            tl.store(dx + place, ((dhat - hat * mean[:, None]) * scale).to(dx.dtype.element_ty), mask=inside)
    if WANT_WEIGHT:
        tl.store(dweight + tl.program_id(0) * width + column, total, mask=column < width)


def _sizes(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512))}


def forward(x: Tensor, weight: Tensor, eps: float, form: str, y: Tensor, inverse: Tensor) -> None:
    """Writes y (N, width) and inverse (N, 1) of contiguous x."""
    n, width = x.shape
    sizes = _sizes(width)
    if x.numel():
        grid = (triton.cdiv(n, sizes["ROWS"]),)
        _forward[grid](
            x, weight, y, inverse, n, width, eps, ROUNDED=form == "rounded", SHIFTED=form == "shifted", **sizes
        )


def backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: str, want: Sequence[int]) -> list[Tensor]:
    """dx and dweight, those that `want` asks for, of contiguous dy and x (N, width)."""
    n, width = x.shape
    sizes, (want_x, want_weight) = _sizes(width), (bool(one) for one in want)
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(n, sizes["ROWS"]), WAVES * cores))
    dx = torch.empty_like(x) if want_x else x
    sums = x.new_zeros((programs if want_weight else 1, width), dtype=torch.float32)
    if x.numel():
        _backward[(programs,)](
            dy, x, weight, inverse, dx, sums, n, width,
            SHIFTED=form == "shifted", WANT_X=want_x, WANT_WEIGHT=want_weight, **sizes,
        )  # fmt: skip
    return ([dx] if want_x else []) + ([sums.sum(0).to(weight.dtype)] if want_weight else [])
