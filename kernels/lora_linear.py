"""LoRA linear layers as one autograd operation over frozen plain or NF4 weights (arXiv 2106.09685, 2305.14314).

    y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ

W (out, in) never gets a gradient. Layers that read the same x (q, k and v; gate and up) go through one call: one
product with their A stacked, one mask of dropout, one dX that all of them add to. An NF4 base is dequantised into a
buffer that all layers share (workspace.py), once in forward and once in backward. The forward keeps x and s = drop(x)
Aᵀ (r columns a layer); the backward computes dY B once, for dA and dX. a and b may be wider than x (fp32 master
weights): the work is done in x's dtype, their gradients come in theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nf4 import NF4
from .workspace import Base, backward_weight, forward_weight, plain_weight

__all__ = [
    "Base", "Projection", "flat", "frozen_linear", "lora_group", "lora_linear", "naive_lora_linear", "plain_weight",
]  # fmt: skip

_FIELDS = ("packed", "absmax", "nested_absmax", "nested_code", "offset")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer: base (out, in), bias (out) and, where it is adapted, a (r, in), b (out, r) and their scale."""

    base: Base
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else int(self.a.shape[0])


@dataclass(frozen=True)
class Flat:
    """Projections as an operator's arguments. layout: five numbers a projection: tensors of its base, out, in, block
    size and nested block size; a, b and scales: of all or of none; bias: of those that `biased` says."""

    base: list[Tensor]
    layout: list[int]
    a: list[Tensor]
    b: list[Tensor]
    scales: list[float]
    bias: list[Tensor]
    biased: list[int]


def flat(projections: Sequence[Projection]) -> Flat:
    """Of projections that are all adapted or all frozen."""
    base: list[Tensor] = []
    layout: list[int] = []
    for one in projections:
        parts = list(one.base.tensors().values()) if isinstance(one.base, NF4) else [one.base.detach()]
        sizes = [one.base.blocksize, one.base.nested_blocksize] if isinstance(one.base, NF4) else [0, 0]
        base += parts
        layout += [len(parts), *one.base.shape, *sizes]
    return Flat(
        base,
        layout,
        [one.a for one in projections if one.a is not None],
        [one.b for one in projections if one.b is not None],
        [float(one.scale) for one in projections],
        [one.bias for one in projections if one.bias is not None],
        [int(one.bias is not None) for one in projections],
    )


def unflat(of: Flat, dtype: torch.dtype) -> list[Projection]:
    """The projections again; dtype: of the computation."""
    found, at, biases = [], 0, iter(of.bias)
    for index in range(len(of.layout) // 5):
        count, out, width, blocksize, nested = of.layout[5 * index : 5 * index + 5]
        parts = of.base[at : at + count]
        at += count
        base: Base = parts[0]
        if blocksize:
            named: dict[str, Any] = dict(zip(_FIELDS, parts, strict=False))
            base = NF4(shape=(out, width), dtype=dtype, blocksize=blocksize, nested_blocksize=nested, **named)
        a, b = (of.a[index], of.b[index]) if of.a else (None, None)
        bias = next(biases) if of.biased[index] else None
        found.append(Projection(base, a, b, of.scales[index], bias))
    return found


def stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor:
    """(R, in) of all their A, R the sum of their ranks."""
    matrices = [one.a for one in projections if one.a is not None]
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).to(dtype)


def dropped(x: Tensor, keep: Tensor | None, keep_rate: float) -> Tensor:
    return x if keep is None else (x * keep).div_(keep_rate)


def columns(projections: Sequence[Projection]) -> list[slice]:
    """Each projection's columns in s."""
    ends = [0]
    for one in projections:
        ends.append(ends[-1] + one.rank)
    return [slice(start, end) for start, end in pairwise(ends)]


def run_forward(
    x: Tensor, projections: Sequence[Projection], keep: Tensor | None, keep_rate: float
) -> tuple[list[Tensor], Tensor]:
    """Outputs (T, out) of x (T, in), and s (T, R)."""
    adapted = projections[0].a is not None
    s = dropped(x, keep, keep_rate) @ stacked_a(projections, x.dtype).t() if adapted else x.new_empty(x.shape[0], 0)
    outputs = []
    for one, part in zip(projections, columns(projections), strict=True):
        y = F.linear(x, forward_weight(one.base, x.dtype), None if one.bias is None else one.bias.to(x.dtype))
        if one.b is not None:
            y.addmm_(s[:, part], one.b.to(x.dtype).t(), alpha=one.scale)
        outputs.append(y)
    return outputs, s


def narrow_grads(dys: Sequence[Tensor], projections: Sequence[Projection], s: Tensor) -> Tensor:
    """(T, R) gradients of s."""
    ds = torch.empty_like(s)
    for one, part, dy in zip(projections, columns(projections), dys, strict=True):
        if one.b is not None:
            torch.mm(dy, (one.b * one.scale).to(dy.dtype), out=ds[:, part])
    return ds


def input_grad(
    dys: Sequence[Tensor], ds: Tensor, projections: Sequence[Projection], keep: Tensor | None, keep_rate: float
) -> Tensor:
    """(T, in), all projections' in one buffer."""
    first, *others = zip(projections, dys, strict=True)
    dx = first[1] @ backward_weight(first[0].base, ds.dtype)
    for one, dy in others:
        dx.addmm_(dy, backward_weight(one.base, ds.dtype))
    if projections[0].a is None:
        return dx
    a = stacked_a(projections, ds.dtype)
    return dx.addmm_(ds, a) if keep is None else dx.addcmul_(ds @ a, keep.to(ds.dtype), value=1 / keep_rate)


def a_grad(ds: Tensor, x: Tensor, keep: Tensor | None, keep_rate: float) -> Tensor:
    """(R, in), of all A stacked."""
    return ds.t() @ dropped(x, keep, keep_rate)


def b_grads(dys: Sequence[Tensor], s: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    found = []
    for one, part, dy in zip(projections, columns(projections), dys, strict=True):
        if one.b is not None:
            found.append((dy.t() @ s[:, part]).mul_(one.scale).to(one.b.dtype))
    return found


def bias_grads(dys: Sequence[Tensor], projections: Sequence[Projection]) -> list[Tensor]:
    biases = [one.bias for one in projections]
    return [dy.sum(dim=0).to(bias.dtype) for bias, dy in zip(biases, dys, strict=True) if bias is not None]


@torch.library.custom_op("gristmill::lora", mutates_args=())
def _lora(
    x: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep: Tensor | None,
    keep_rate: float,
) -> list[Tensor]:
    """Outputs (T, out) of each projection of x (T, in), and last s (T, R)."""
    of = Flat(list(base), list(layout), list(a), list(b), list(scales), list(bias), list(biased))
    outputs, s = run_forward(x, unflat(of, x.dtype), keep, keep_rate)
    return [*outputs, s]


@_lora.register_fake
def _(
    x: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep: Tensor | None,
    keep_rate: float,
) -> list[Tensor]:
    outputs = [x.new_empty(x.shape[0], out) for out in layout[1::5]]
    return [*outputs, x.new_empty(x.shape[0], sum(matrix.shape[0] for matrix in a))]


@torch.library.custom_op("gristmill::lora_backward", mutates_args=())
def _lora_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep: Tensor | None,
    keep_rate: float,
    want: Sequence[int],
) -> list[Tensor]:
    """dx, da (R, in), each db, each dbias: those among them that `want` (x, a, b, bias) asks for."""
    of = Flat(list(base), list(layout), list(a), list(b), list(scales), list(bias), list(biased))
    projections = unflat(of, x.dtype)
    want_x, want_a, want_b, want_bias = want
    ds = narrow_grads(dys, projections, s) if want_x or want_a else s
    found = [input_grad(dys, ds, projections, keep, keep_rate)] if want_x else []
    found += [a_grad(ds, x, keep, keep_rate)] if want_a else []
    found += b_grads(dys, s, projections) if want_b else []
    return found + (bias_grads(dys, projections) if want_bias else [])


@_lora_backward.register_fake
def _(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep: Tensor | None,
    keep_rate: float,
    want: Sequence[int],
) -> list[Tensor]:
    found = [x.new_empty(x.shape)] if want[0] else []
    if want[1]:
        found.append(x.new_empty(s.shape[1], x.shape[1]))
    found += [matrix.new_empty(matrix.shape) for matrix in b if want[2]]
    return found + [vector.new_empty(vector.shape) for vector in bias if want[3]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, base, ctx.layout, a, b, ctx.scales, bias, ctx.biased, keep, ctx.keep_rate = inputs
    ctx.counts = (len(base), len(a), len(b), len(bias))
    ctx.save_for_backward(x, output[-1], keep, *base, *a, *b, *bias)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, s, keep, *rest = ctx.saved_tensors
    base, a, b, bias = split(rest, ctx.counts)
    asked = ctx.needs_input_grad
    want = [
        int(bool(flag if isinstance(flag, bool) else any(flag))) for flag in (asked[0], asked[3], asked[4], asked[6])
    ]
    found = iter(
        _lora_backward(
            grads[:-1], x, s, base, ctx.layout, a, b, ctx.scales, bias, ctx.biased, keep, ctx.keep_rate, want
        )
    )
    dx = next(found) if want[0] else None
    da: list[Any] = [None] * len(a)
    if want[1]:
        stacked, ranks = next(found), [matrix.shape[0] for matrix in a]
        da = [part.to(one.dtype) for part, one in zip(stacked.split(ranks), a, strict=True)]
    db: list[Any] = [next(found) for _ in b] if want[2] else [None] * len(b)
    dbias: list[Any] = [next(found) for _ in bias] if want[3] else [None] * len(bias)
    return dx, [None] * len(base), None, da, db, None, dbias, None, None, None


def split(tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    found, at = [], 0
    for count in counts:
        found.append(tensors[at : at + count])
        at += count
    return found


_lora.register_autograd(_backward, setup_context=_setup)


def check(x: Tensor, projections: Sequence[Projection], keep: Tensor | None) -> None:
    """ValueError where shapes do not fit or only some of the projections are adapted."""
    for one in projections:
        out, width = one.base.shape
        a, b = one.a, one.b
        fits = x.shape[-1] == width and (a is None) == (b is None) == (projections[0].a is None)
        if a is not None and b is not None:
            fits = fits and a.shape[1] == width and b.shape[0] == out and a.shape[0] == b.shape[1]
        if not fits:
            shapes = [None if m is None else tuple(m.shape) for m in (a, b)]
            raise ValueError(
                f"x {tuple(x.shape)}, base {tuple(one.base.shape)}, a {shapes[0]} and b {shapes[1]} do not fit: "
                "want (…, in), (out, in), (r, in), (out, r), and a and b of all layers of a group or of none"
            )
    if keep is not None and keep.shape != x.shape:
        raise ValueError(f"keep {tuple(keep.shape)} must have the shape of x {tuple(x.shape)}")


def lora_group(
    x: Tensor, projections: Sequence[Projection], keep: Tensor | None = None, keep_rate: float = 1.0
) -> tuple[Tensor, ...]:
    """Outputs (…, out) of x (…, in) by each of the projections, which are all adapted or all frozen.

    keep: bool, x's shape, dropout of the adapters' input, one mask for the group; what is kept is divided by keep_rate.
    Gradients go to x and to each a, b and bias. ValueError where the shapes do not fit.
    """
    check(x, projections, keep)
    of, width = flat(projections), x.shape[-1]
    mask = None if keep is None else keep.reshape(-1, width)
    found = _lora(x.reshape(-1, width), of.base, of.layout, of.a, of.b, of.scales, of.bias, of.biased, mask, keep_rate)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found[:-1])


def lora_linear(
    x: Tensor,
    base: Base,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_rate: float = 1.0,
) -> Tensor:
    """y (…, out) of x (…, in) by base W (out, in), a (r, in), b (out, r), bias (out): `lora_group` of one."""
    return lora_group(x, [Projection(base, a, b, scale, bias)], keep, keep_rate)[0]


def frozen_linear(x: Tensor, base: Base, bias: Tensor | None = None) -> Tensor:
    """F.linear by a frozen plain or NF4 weight, bit for bit; gradients go to x and bias."""
    return lora_group(x, [Projection(base, bias=bias)])[0]


def naive_lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_rate: float = 1.0,
) -> Tensor:
    """The definition in plain torch: the oracle of `lora_linear`."""
    kept = x if keep is None else x * keep / keep_rate
    low = F.linear(kept, a.to(x.dtype))
    return F.linear(x, weight.detach(), bias) + scale * F.linear(low, b.to(x.dtype))
