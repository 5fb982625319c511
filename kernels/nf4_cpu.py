"""NF4 on the CPU, compiled: a weight is looked up, not computed, so that dequantising runs at the speed of a copy.

A block has 16 possible weights. They are computed once (code · absmax in fp32, rounded to the output's type: the same
operations as in torch, hence the same bits), and every weight of the block is one lane of a permutation of these 16:
64 weights take 2 permutations on AVX-512; elsewhere one shuffle of 16 bytes per byte of 16 weights (SSSE3, NEON).
One core, 4096 x 4096 into bf16: 5.8 ms, 16 bytes at a time 6.7 ms, copy_ of the result 6.5 ms.

Threads are torch's own (libgomp's, asked for torch.get_num_threads()), so that none of another pool waits for a core
on which one of torch's spins; where there is no libgomp, Python threads. Work is handed out in chunks by a counter.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from .nf4 import CODE, THRESHOLDS

CHUNK = 1 << 17  # weights that a thread takes at once: 64 KB packed
LEAST = 1 << 18  # weights for each thread: half of this takes 40 microseconds, waking a sleeping thread about as long
STEP = 32  # weights of 16 packed bytes
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# words of a job
NEXT, N, BLOCK, KIND, PACKED, ABSMAX, WEIGHTS, NESTED, NESTED_BLOCK, NESTED_CODE, OFFSET = range(11)
WORDS = 11

_F32, _F16 = ir.FloatType(), ir.HalfType()
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def _all(kind: Any, lanes: int, value: float) -> Any:
    return ir.Constant(_vector(kind, lanes), [value] * lanes)


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_I64, offset))


def _loaded(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _stored(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    """The named lanes of two vectors, those of `other` counted on."""
    return builder.shuffle_vector(one, other, ir.Constant(_vector(_I32, len(lanes)), lanes))


def _interleaved(builder: Any, one: Any, other: Any) -> list[Any]:
    """one[0], other[0], one[1], …: in two vectors."""
    half, lanes = one.type.count // 2, one.type.count
    return [
        _shuffled(builder, one, other, [lane for i in range(start, start + half) for lane in (i, lanes + i)])
        for start in (0, half)
    ]


def _spread(builder: Any, value: Any) -> Any:
    one = builder.insert_element(_all(_F32, 16, 0.0), value, ir.Constant(_I32, 0))
    return _shuffled(builder, one, one, [0] * 16)


def _called(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kinds = [argument.type for argument in arguments]
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, arguments)


def _machine() -> str:
    """How this processor looks 16 entries up: "avx512", "ssse3" or "neon"; "" where neither."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    known = set(features.split(","))
    if triple.startswith("x86_64") and {"+ssse3", "+f16c"} <= known:
        return "avx512" if {"+avx512bw", "+avx512f"} <= known else "ssse3"
    return "neon" if triple.startswith(("aarch64", "arm64")) else ""


if not _machine():
    raise ImportError("no look-up of 16 entries is known for this processor: AVX2 or NEON has one")


def devices() -> tuple[str, ...]:
    return ("cpu",)


def _sixteen(builder: Any, absmax: Any, kind: int) -> Any:
    """The 16 weights of a block: floats, or the bits of halves."""
    value = builder.fmul(ir.Constant(_vector(_F32, 16), list(CODE)), _spread(builder, absmax))
    if kind == KINDS[torch.float32]:
        return value
    if kind == KINDS[torch.float16]:
        return builder.bitcast(builder.fptrunc(value, _vector(_F16, 16)), _vector(_I16, 16))
    bits = builder.bitcast(value, _vector(_I32, 16))
    odd = builder.and_(builder.lshr(bits, _all(_I32, 16, 16)), _all(_I32, 16, 1))
    nearest = builder.lshr(builder.add(bits, builder.add(odd, _all(_I32, 16, 0x7FFF))), _all(_I32, 16, 16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, _all(_I32, 16, 0x7FC0), nearest), _vector(_I16, 16))


def _step_wide(builder: Any, table: Any, source: Any, out: Any) -> None:
    """STEP weights by AVX-512: its permutations read an index's low bits alone, so the neighbour's may stay."""
    if table.type.element == _F32:
        for half in range(2):
            byte = builder.zext(_loaded(builder, _at(builder, source, 8 * half), _vector(_I8, 8)), _vector(_I64, 8))
            both = builder.or_(builder.lshr(byte, _all(_I64, 8, 4)), builder.shl(byte, _all(_I64, 8, 32)))
            index = builder.bitcast(both, _vector(_I32, 16))
            found = _called(builder, "llvm.x86.avx512.permvar.sf.512", _vector(_F32, 16), table, index)
            _stored(builder, found, _at(builder, out, 64 * half))
        return
    byte = builder.zext(_loaded(builder, source, _vector(_I8, 16)), _vector(_I32, 16))
    both = builder.or_(builder.lshr(byte, _all(_I32, 16, 4)), builder.shl(byte, _all(_I32, 16, 16)))
    twice = _shuffled(builder, table, table, [*range(16), *range(16)])
    index = builder.bitcast(both, _vector(_I16, 32))
    _stored(builder, _called(builder, "llvm.x86.avx512.permvar.hi.512", _vector(_I16, 32), twice, index), out)


def _step_narrow(builder: Any, table: Any, source: Any, out: Any, name: str) -> None:
    """STEP weights by shuffles of 16 bytes, one for each byte of a weight."""
    width = 4 if table.type.element == _F32 else 2
    raw = builder.bitcast(table, _vector(_I8, 16 * width))
    planes = [_shuffled(builder, raw, raw, [width * i + part for i in range(16)]) for part in range(width)]
    byte = _loaded(builder, source, _vector(_I8, 16))
    high, low = builder.lshr(byte, _all(_I8, 16, 4)), builder.and_(byte, _all(_I8, 16, 15))
    for half, index in enumerate(_interleaved(builder, high, low)):
        parts = [_called(builder, name, _vector(_I8, 16), plane, index) for plane in planes]
        vectors = _interleaved(builder, parts[0], parts[1])
        if width == 4:
            upper = _interleaved(builder, parts[2], parts[3])
            words = [[builder.bitcast(v, _vector(_I16, 8)) for v in pair] for pair in (vectors, upper)]
            vectors = [v for pair in zip(*words, strict=True) for v in _interleaved(builder, *pair)]
        for i, vector in enumerate(vectors):
            _stored(builder, vector, _at(builder, out, 16 * (len(vectors) * half + i)))


def _unpacking(kind: int) -> Any:
    size = 4 if kind == 0 else 2

    @intrinsic
    def unpacked(typing, absmax, source, out, steps):  # type: ignore[no-untyped-def]
        """unpacked(absmax, source, out, steps): so many STEPs of one block's weights from packed bytes to `out`."""

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            absmax, source, out, steps = values
            machine, table = _machine(), _sixteen(builder, absmax, kind)
            with cgutils.for_range(builder, steps) as loop:
                here = builder.add(source, builder.mul(loop.index, ir.Constant(_I64, STEP // 2)))
                there = builder.add(out, builder.mul(loop.index, ir.Constant(_I64, STEP * size)))
                if machine == "avx512":
                    _step_wide(builder, table, here, there)
                else:
                    names = {"ssse3": "llvm.x86.ssse3.pshuf.b.128", "neon": "llvm.aarch64.neon.tbl1.v16i8"}
                    _step_narrow(builder, table, here, there, names[machine])
            return context.get_dummy_value()

        return types.void(types.float32, types.intp, types.intp, types.intp), codegen

    return unpacked


_unpacked_f32, _unpacked_f16, _unpacked_bf16 = (_unpacking(kind) for kind in range(3))


def _sixteen_floats(builder: Any, address: Any, kind: int) -> Any:
    if kind == KINDS[torch.float32]:
        return _loaded(builder, address, _vector(_F32, 16))
    bits = _loaded(builder, address, _vector(_I16, 16))
    if kind == KINDS[torch.float16]:
        return builder.fpext(builder.bitcast(bits, _vector(_F16, 16)), _vector(_F32, 16))
    wide = builder.shl(builder.zext(bits, _vector(_I32, 16)), _all(_I32, 16, 16))
    return builder.bitcast(wide, _vector(_F32, 16))


def _packing(kind: int) -> Any:
    size = 4 if kind == 0 else 2

    @intrinsic
    def packed(typing, source, out, steps):  # type: ignore[no-untyped-def]
        """packed(source, out, steps): one block of so many STEPs of weights into `out`; its absmax. That is taken from
        the numbers' bits, as integers: whatever is not finite is then the greatest."""

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            source, out, steps = values
            vectors = builder.shl(steps, ir.Constant(_I64, 1))
            top = cgutils.alloca_once_value(builder, _all(_I32, 16, 0))
            with cgutils.for_range(builder, vectors) as loop:
                here = builder.add(source, builder.mul(loop.index, ir.Constant(_I64, 16 * size)))
                bits = builder.bitcast(_sixteen_floats(builder, here, kind), _vector(_I32, 16))
                bits, known = builder.and_(bits, _all(_I32, 16, 0x7FFFFFFF)), builder.load(top)
                builder.store(builder.select(builder.icmp_signed(">", bits, known), bits, known), top)
            found = builder.load(top)
            for lanes in (8, 4, 2, 1):
                other = _shuffled(builder, found, found, [(i + lanes) % 16 for i in range(16)])
                found = builder.select(builder.icmp_signed(">", other, found), other, found)
            absmax = builder.bitcast(builder.extract_element(found, ir.Constant(_I32, 0)), _F32)
            inverse = builder.fdiv(ir.Constant(_F32, 1.0), absmax)
            finite = builder.fcmp_ordered("<", inverse, ir.Constant(_F32, float("inf")))
            factor = _spread(builder, builder.select(finite, inverse, ir.Constant(_F32, 0.0)))
            with cgutils.for_range(builder, vectors) as loop:
                here = builder.add(source, builder.mul(loop.index, ir.Constant(_I64, 16 * size)))
                scaled = builder.fmul(_sixteen_floats(builder, here, kind), factor)
                index = _all(_I32, 16, 0)
                for threshold in THRESHOLDS:
                    above = builder.fcmp_ordered(">", scaled, _all(_F32, 16, threshold))
                    index = builder.add(index, builder.zext(above, _vector(_I32, 16)))
                even, odd = (_shuffled(builder, index, index, list(range(first, 16, 2))) for first in (0, 1))
                byte = builder.or_(builder.shl(even, _all(_I32, 8, 4)), odd)
                there = builder.add(out, builder.mul(loop.index, ir.Constant(_I64, 8)))
                _stored(builder, builder.trunc(byte, _vector(_I8, 8)), there)
            return absmax

        return types.float32(types.intp, types.intp, types.intp), codegen

    return packed


_packed_f32, _packed_f16, _packed_bf16 = (_packing(kind) for kind in range(3))


@intrinsic
def _pointer(typing, address):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], _I8.as_pointer())

    return types.voidptr(types.intp), codegen


@intrinsic
def _claimed(typing, counter, count):  # type: ignore[no-untyped-def]
    """_claimed(address of a counter, count): the counter before `count` was added, in one step for all threads."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        counter, count = values
        return builder.atomic_rmw("add", builder.inttoptr(counter, _I64.as_pointer()), count, "monotonic")

    return types.intp(types.intp, types.intp), codegen


def _compiled(make: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    """`make` of numba, the machine code cached where there is a folder for it."""

    def wrapped(function: Any) -> Any:
        try:
            return make(*arguments, cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError:  # no folder to cache in
            return make(*arguments, nogil=True, error_model="numpy")(function)

    return wrapped


@_compiled(njit)
def _unpack(absmax, source, out, steps, kind):  # type: ignore[no-untyped-def]
    if kind == 0:
        _unpacked_f32(absmax, source, out, steps)
    elif kind == 1:
        _unpacked_f16(absmax, source, out, steps)
    else:
        _unpacked_bf16(absmax, source, out, steps)


@_compiled(njit)
def _pack(source, out, steps, kind):  # type: ignore[no-untyped-def]
    if kind == 0:
        return _packed_f32(source, out, steps)
    if kind == 1:
        return _packed_f16(source, out, steps)
    return _packed_bf16(source, out, steps)


@_compiled(njit)
def _copied(source, out, count):  # type: ignore[no-untyped-def]
    carray(_pointer(out), (count,), np.uint8)[:] = carray(_pointer(source), (count,), np.uint8)


_CALLBACK = types.void(types.CPointer(types.int64))


@_compiled(cfunc, _CALLBACK)
def _dequantise(words):  # type: ignore[no-untyped-def]
    """Takes chunks of the job until none is left."""
    job = carray(words, (WORDS,))
    n, block, kind, nested_block = job[N], job[BLOCK], job[KIND], job[NESTED_BLOCK]
    size = 4 if kind == 0 else 2
    blocks = (n + block - 1) // block
    nested = job[NESTED] != 0
    plain = carray(_pointer(job[ABSMAX]), (blocks,), np.float32)
    index = carray(_pointer(job[ABSMAX]), (blocks,), np.uint8)
    outer = carray(_pointer(job[NESTED]), (blocks,), np.float32)
    code = carray(_pointer(job[NESTED_CODE]), (256,), np.float32)
    offset = carray(_pointer(job[OFFSET]), (1,), np.float32)[0] if nested else np.float32(0.0)
    chunk = max(1, CHUNK // block)
    last, rest = np.zeros(STEP // 2, np.uint8), np.zeros(STEP * 4, np.uint8)
    while True:
        first = _claimed(job.ctypes.data, chunk)
        if first >= blocks:
            break
        group = first // nested_block  # a division for each block would take as long as the block
        end = (group + 1) * nested_block
        for i in range(first, min(first + chunk, blocks)):
            if i == end:
                group, end = group + 1, end + nested_block
            absmax = code[index[i]] * outer[group] + offset if nested else plain[i]
            count = min(block, n - i * block)
            source, out, steps = job[PACKED] + i * (block // 2), job[WEIGHTS] + i * block * size, count // STEP
            if kind == 0:
                _unpacked_f32(absmax, source, out, steps)
            elif kind == 1:
                _unpacked_f16(absmax, source, out, steps)
            else:
                _unpacked_bf16(absmax, source, out, steps)
            left = count - steps * STEP
            if left:
                _copied(source + steps * (STEP // 2), last.ctypes.data, (left + 1) // 2)
                _unpack(absmax, last.ctypes.data, rest.ctypes.data, 1, kind)
                _copied(rest.ctypes.data, out + steps * STEP * size, left * size)


@_compiled(cfunc, _CALLBACK)
def _quantise(words):  # type: ignore[no-untyped-def]
    """Takes chunks of the job until none is left."""
    job = carray(words, (WORDS,))
    n, block, kind = job[N], job[BLOCK], job[KIND]
    size = 4 if kind == 0 else 2
    blocks = (n + block - 1) // block
    absmax = carray(_pointer(job[ABSMAX]), (blocks,), np.float32)
    chunk = max(1, CHUNK // block)
    while True:
        first = _claimed(job.ctypes.data, chunk)
        if first >= blocks:
            break
        for i in range(first, min(first + chunk, blocks)):
            count = min(block, n - i * block)
            source, out = job[WEIGHTS] + i * block * size, job[PACKED] + i * (block // 2)
            if count == block:
                absmax[i] = _pack(source, out, block // STEP, kind)
            else:  # filled up with zeros
                whole, last = np.zeros(block * size, np.uint8), np.empty(block // 2, np.uint8)
                _copied(source, whole.ctypes.data, count * size)
                absmax[i] = _pack(whole.ctypes.data, last.ctypes.data, block // STEP, kind)
                _copied(last.ctypes.data, out, (count + 1) // 2)


@cache
def _torch_threads() -> Any:
    """libgomp's entry to the threads on which torch runs; None where torch came with another OpenMP or none."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


def _run(here: Any, job: Any) -> None:
    """Runs `here`(job) on as many of torch's threads as there is work for."""
    threads = max(1, min(torch.get_num_threads(), int(job[N]) // LEAST))
    entry = _torch_threads()
    if threads == 1:
        here.ctypes(job.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    elif entry is not None:
        entry(here.address, job.ctypes.data, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            pointer = job.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
            for done in [pool.submit(here.ctypes, pointer) for _ in range(threads)]:
                done.result()


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
    """Writes the weights into `out` (contiguous). Tensors as in NF4, contiguous, on the CPU, their sizes checked."""
    job = np.zeros(WORDS, np.int64)
    job[[N, BLOCK, KIND, NESTED_BLOCK]] = out.numel(), blocksize, KINDS[out.dtype], nested_blocksize
    job[[PACKED, ABSMAX, WEIGHTS]] = packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
    if nested_absmax is not None and nested_code is not None and offset is not None:
        job[NESTED] = nested_absmax.data_ptr()
        job[[NESTED_CODE, OFFSET]] = nested_code.data_ptr(), offset.data_ptr()
    _run(_dequantise, job)


def quantise(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of a contiguous weight. A block that holds inf or NaN has such an absmax."""
    n = flat.numel()
    packed, absmax = torch.empty((n + 1) // 2, 1, dtype=torch.uint8), torch.empty(math.ceil(n / blocksize))
    job = np.zeros(WORDS, np.int64)
    job[[N, BLOCK, KIND]] = n, blocksize, KINDS[flat.dtype]
    job[[PACKED, ABSMAX, WEIGHTS]] = packed.data_ptr(), absmax.data_ptr(), flat.data_ptr()
    _run(_quantise, job)
    return packed, absmax
