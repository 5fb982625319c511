"""Sixteen float32 numbers at a time: LLVM vector code for numba kernels, where its loop vectoriser leaves things slow:
extremes, and loops as short as texts and attention heads. Addresses and strides are in bytes."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
ROWS = 4  # rows that share each loaded vector

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WHOLE = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def _loaded(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _stored(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _spread(builder: Any, value: Any) -> Any:
    """A vector of one number."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_WHOLE, [0] * LANES))


def _constant(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


@intrinsic
def multiplied(typing, rows, row_stride, vectors, vector_stride, out, out_stride, count):  # type: ignore[no-untyped-def]
    """multiplied(rows, row_stride, vectors, vector_stride, out, out_stride, count): out[r] = sum over n < count of
    rows[r][n] · vectors[n], for ROWS rows r; count is at least 1."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows, row_stride, vectors, vector_stride, out, out_stride, count = values
        starts = [builder.add(rows, builder.mul(row_stride, ir.Constant(_I64, r))) for r in range(ROWS)]
        entry = builder.block
        loop, done = builder.append_basic_block("sum"), builder.append_basic_block("summed")
        builder.branch(loop)
        builder.position_at_end(loop)
        n = builder.phi(_I64)
        sums = [builder.phi(_VECTOR) for _ in range(ROWS)]
        n.add_incoming(ir.Constant(_I64, 0), entry)
        vector = _loaded(builder, builder.add(vectors, builder.mul(n, vector_stride)), _VECTOR)
        offset = builder.shl(n, ir.Constant(_I64, 2))
        after = builder.add(n, ir.Constant(_I64, 1))
        n.add_incoming(after, loop)
        new = []
        for start, total in zip(starts, sums, strict=True):
            factor = _spread(builder, _loaded(builder, builder.add(start, offset), _F32))
            new.append(builder.fadd(total, builder.fmul(factor, vector, flags=("fast",)), flags=("fast",)))
            total.add_incoming(_constant(0.0), entry)
            total.add_incoming(new[-1], loop)
        builder.cbranch(builder.icmp_signed("<", after, count), loop, done)
        builder.position_at_end(done)
        for r, total in enumerate(new):
            _stored(builder, total, builder.add(out, builder.mul(out_stride, ir.Constant(_I64, r))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


def _extreme(builder: Any, row: Any, count: Any, sign: str) -> Any:
    """The greatest (sign ">") or least ("<") number of so many vectors."""
    best = cgutils.alloca_once_value(builder, _loaded(builder, row, _VECTOR))
    with cgutils.for_range(builder, count) as loop:
        value = _loaded(builder, builder.add(row, builder.mul(loop.index, ir.Constant(_I64, 4 * LANES))), _VECTOR)
        known = builder.load(best)
        builder.store(builder.select(builder.fcmp_ordered(sign, value, known), value, known), best)
    found = builder.load(best)
    one = builder.extract_element(found, ir.Constant(_I32, 0))
    for lane in range(1, LANES):
        other = builder.extract_element(found, ir.Constant(_I32, lane))
        one = builder.select(builder.fcmp_ordered(sign, other, one), other, one)
    return one


@intrinsic
def highest(typing, row, vectors):  # type: ignore[no-untyped-def]
    """highest(row, vectors): the greatest of so many vectors' numbers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        row, count = values
        return _extreme(builder, row, count, ">")

    return types.float32(types.intp, types.intp), codegen


@intrinsic
def lowest(typing, row, vectors):  # type: ignore[no-untyped-def]
    """lowest(row, vectors): the least of so many vectors' numbers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        row, count = values
        return _extreme(builder, row, count, "<")

    return types.float32(types.intp, types.intp), codegen


@intrinsic
def softmax(typing, row, vectors):  # type: ignore[no-untyped-def]
    """softmax(row, vectors): row <- 2 ** row / sum(2 ** row) in place over so many vectors, to within 3e-7. What is
    2 ** -64 of the greatest and less counts as that: denormal numbers would take ten times as long."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        row, count = values
        top = _spread(builder, _extreme(builder, row, count, ">"))
        lanes = cgutils.alloca_once_value(builder, _constant(0.0))
        with cgutils.for_range(builder, count) as loop:
            address = builder.add(row, builder.mul(loop.index, ir.Constant(_I64, 4 * LANES)))
            x = builder.fsub(_loaded(builder, address, _VECTOR), top)
            x = builder.select(builder.fcmp_ordered(">", x, _constant(-64.0)), x, _constant(-64.0))
            whole = builder.fptosi(builder.fsub(x, _constant(0.5)), _WHOLE)  # cut towards 0: the nearest, of x <= 0
            f = builder.fmul(builder.fsub(x, builder.sitofp(whole, _VECTOR)), _constant(0.6931471805599453))
            p = _constant(1 / 720)
            for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
                p = builder.fadd(builder.fmul(p, f, flags=("fast",)), _constant(factor), flags=("fast",))
            exponent = builder.add(whole, ir.Constant(_WHOLE, [127] * LANES))
            power = builder.bitcast(builder.shl(exponent, ir.Constant(_WHOLE, [23] * LANES)), _VECTOR)
            value = builder.fmul(p, power)
            _stored(builder, value, address)
            builder.store(builder.fadd(builder.load(lanes), value), lanes)
        found = builder.load(lanes)
        total = ir.Constant(_F32, 0.0)
        for lane in range(LANES):
            total = builder.fadd(total, builder.extract_element(found, ir.Constant(_I32, lane)))
        per = _spread(builder, builder.fdiv(ir.Constant(_F32, 1.0), total))
        with cgutils.for_range(builder, count) as loop:
            address = builder.add(row, builder.mul(loop.index, ir.Constant(_I64, 4 * LANES)))
            _stored(builder, builder.fmul(_loaded(builder, address, _VECTOR), per), address)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen
