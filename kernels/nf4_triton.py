"""NF4 in Triton: a weight matrix is dequantised by one launch, its nested block constants decoded on the way.

Dequantising is bound by memory: 0.52 bytes read and 2 written for a weight. A thread reads four packed bytes (a warp a
whole line of 128), looks the eight codes up in 64 bytes that stay in L1, and writes its eight halves as 16 bytes.
Products and sums are never fused (a fused one rounds once where bitsandbytes rounds twice), indices are 64 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import CODE, THRESHOLDS, constant

WORDS = 512  # packed words of eight weights for one program of four warps
TILE = 4096  # weights that one program quantises


def devices() -> tuple[str, ...]:
    """The kinds of device that the kernels run on; a CPU where triton interprets."""
    return ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)


@triton.jit
def _places(program, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The SIZE places of a program, in 64 bits: a matrix may have more than 2 ** 31 weights."""
    return program.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _constants(block, absmax, nested_absmax, nested_code, offset, NESTED_BLOCK: tl.constexpr, here):  # type: ignore[no-untyped-def]
    """The absmax of each block in fp32; NESTED_BLOCK 0 where they are stored so."""
    if NESTED_BLOCK == 0:
        return tl.load(absmax + block, mask=here, other=0.0)
    index = tl.load(absmax + block, mask=here, other=0).to(tl.int32)
    outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=here, other=0.0)
    return tl.load(nested_code + index) * outer + tl.load(offset)


@triton.jit
def _dequantise(  # type: ignore[no-untyped-def]
    packed, absmax, nested_absmax, nested_code, offset, code, out, n,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WORDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    words = n // 8
    word = _places(program, WORDS)
    here = word < words
    bits = tl.load(packed.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=here, other=0)
    scale = _constants(word * 8 // BLOCK, absmax, nested_absmax, nested_code, offset, NESTED_BLOCK, here)
    weight = tl.arange(0, 8)
    shift = weight // 2 * 8 + (1 - weight % 2) * 4  # the first weight of a byte is in its high bits
    value = tl.load(code + ((bits[:, None] >> shift[None, :]) & 15)) * scale[:, None]
    tl.store(out + word[:, None] * 8 + weight[None, :], value.to(out.dtype.element_ty), mask=here[:, None])
    if TAIL:  # noqa: SIM102  `TAIL and …` would compile what follows for every matrix
        if program == words // WORDS:  # the last weights, fewer than eight
            last = words.to(tl.int64) * 8 + weight
            there = last < n
            byte = tl.load(packed + last // 2, mask=there, other=0).to(tl.int32)
            factor = _constants(last // BLOCK, absmax, nested_absmax, nested_code, offset, NESTED_BLOCK, there)
            rest = tl.load(code + ((byte >> ((1 - weight % 2) * 4)) & 15)) * factor
            tl.store(out + last, rest.to(out.dtype.element_ty), mask=there)


def dequantise(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """Writes the weights into `out` (contiguous) by one launch. Tensors as in NF4, contiguous, their sizes checked."""
    n = out.numel()
    nested = nested_absmax is not None
    if packed.data_ptr() % 4:  # read as words
        packed = packed.clone()
    grid = (triton.cdiv(n, 8 * WORDS),)
    with torch.cuda.device(out.get_device()):
        _dequantise[grid](
            packed, absmax, nested_absmax, nested_code, offset, constant(CODE, out.device), out, n, BLOCK=blocksize,
            NESTED_BLOCK=nested_blocksize if nested else 0, WORDS=WORDS, TAIL=n % 8 != 0, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _quantise(weight, packed, absmax, thresholds, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = _places(tl.program_id(0), ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(weight + place, mask=place < n, other=0.0).to(tl.float32)
    # the greatest as integers: what is not finite is then greater than all that is
    top = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + row, top, mask=row * BLOCK < n)
    inverse = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), top)
    scaled = value * tl.where(inverse < float("inf"), inverse, 0.0)[:, None]
    index = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(15):
        index += (scaled > tl.load(thresholds + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(index, (ROWS, BLOCK // 2, 2)))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < n)


def quantise(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of a contiguous weight by one launch. A block that holds inf or NaN has such an absmax."""
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=flat.device)
    rows = max(1, TILE // blocksize)
    with torch.cuda.device(flat.get_device()):
        _quantise[(triton.cdiv(n, rows * blocksize),)](
            flat, packed, absmax, constant(THRESHOLDS, flat.device), n, BLOCK=blocksize, ROWS=rows,
            enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax
