"""A decoder's gated MLP with adapters as one autograd operation: y = down(act(gate(x)) · up(x)).

gate, up and down are LoRA linear layers (lora_linear.py). Kept for the backward: x, the outputs of gate and up, and the
narrow products with A. h = act(gate) · up is made again there, and its gradient's buffer becomes that of gate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .glu import ACTS, glu, glu_backward
from .lora_linear import (
    Flat,
    Projection,
    a_grad,
    b_grads,
    bias_grads,
    check,
    flat,
    input_grad,
    naive_lora_linear,
    narrow_grads,
    run_forward,
    split,
    unflat,
)


@torch.library.custom_op("gristmill::lora_mlp", mutates_args=())
def _lora_mlp(
    x: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    keep_rate: float,
    act: str,
) -> list[Tensor]:
    """y (T, out), gate and up (T, F), s (T, R of gate and up), t (T, r of down)."""
    of = Flat(list(base), list(layout), list(a), list(b), list(scales), list(bias), list(biased))
    gate_up, down = _pair(unflat(of, x.dtype))
    (gate, up), s = run_forward(x, gate_up, keep_x, keep_rate)
    (y,), t = run_forward(glu(gate, up, act), down, keep_h, keep_rate)
    return [y, gate, up, s, t]


@_lora_mlp.register_fake
def _(
    x: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    keep_rate: float,
    act: str,
) -> list[Tensor]:
    ranks = [matrix.shape[0] for matrix in a]
    widths = [layout[11], layout[1], layout[6], ranks[0] + ranks[1], ranks[2]]
    return [x.new_empty(x.shape[0], width) for width in widths]


@torch.library.custom_op("gristmill::lora_mlp_backward", mutates_args=())
def _lora_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    s: Tensor,
    t: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    keep_rate: float,
    act: str,
    want: Sequence[int],
) -> list[Tensor]:
    """dx, da of gate and up stacked, da of down, each db, each dbias: those that `want` (x, a, b, bias) asks for."""
    of = Flat(list(base), list(layout), list(a), list(b), list(scales), list(bias), list(biased))
    gate_up, down = _pair(unflat(of, x.dtype))
    want_x, want_a, want_b, want_bias = want
    dt = narrow_grads([dy], down, t)
    h, dgate, dup = glu_backward(input_grad([dy], dt, down, keep_h, keep_rate), gate, up, act)
    da_down = [a_grad(dt, h, keep_h, keep_rate)] if want_a else []
    del h
    dys = [dgate, dup]
    ds = narrow_grads(dys, gate_up, s)
    found = [input_grad(dys, ds, gate_up, keep_x, keep_rate)] if want_x else []
    found += [a_grad(ds, x, keep_x, keep_rate), *da_down] if want_a else []
    found += [*b_grads(dys, s, gate_up), *b_grads([dy], t, down)] if want_b else []
    return found + ([*bias_grads(dys, gate_up), *bias_grads([dy], down)] if want_bias else [])


@_lora_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    s: Tensor,
    t: Tensor,
    base: Sequence[Tensor],
    layout: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor],
    biased: Sequence[int],
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    keep_rate: float,
    act: str,
    want: Sequence[int],
) -> list[Tensor]:
    found = [x.new_empty(x.shape)] if want[0] else []
    if want[1]:
        found += [x.new_empty(s.shape[1], x.shape[1]), x.new_empty(t.shape[1], gate.shape[1])]
    found += [matrix.new_empty(matrix.shape) for matrix in b if want[2]]
    return found + [vector.new_empty(vector.shape) for vector in bias if want[3]]


def _pair(projections: list[Projection]) -> tuple[list[Projection], list[Projection]]:
    return projections[:2], projections[2:]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, base, ctx.layout, a, b, ctx.scales, bias, ctx.biased, keep_x, keep_h, ctx.keep_rate, ctx.act = inputs
    ctx.counts = (len(base), len(a), len(b), len(bias))
    ctx.set_materialize_grads(False)  # gate and up are outputs for the backward alone
    ctx.save_for_backward(x, *output[1:], keep_x, keep_h, *base, *a, *b, *bias)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, gate, up, s, t, keep_x, keep_h, *rest = ctx.saved_tensors
    base, a, b, bias = split(rest, ctx.counts)
    nothing: tuple[Any, ...] = (
        None, [None] * len(base), None, [None] * len(a), [None] * len(b), None, [None] * len(bias), None,
        None, None, None, None,
    )  # fmt: skip
    if grads[0] is None:
        return nothing
    asked = ctx.needs_input_grad
    want = [int(asked[0]), int(any(asked[3])), int(any(asked[4])), int(any(asked[6]))]
    found = iter(
        _lora_mlp_backward(
            grads[0], x, gate, up, s, t, base, ctx.layout, a, b, ctx.scales, bias, ctx.biased, keep_x, keep_h,
            ctx.keep_rate, ctx.act, want,
        )
    )  # fmt: skip
    dx = next(found) if want[0] else None
    da: list[Any] = list(nothing[3])
    if want[1]:
        da = [*next(found).split([a[0].shape[0], a[1].shape[0]]), next(found)]
        da = [part.to(one.dtype) for part, one in zip(da, a, strict=True)]
    db: list[Any] = [next(found) for _ in b] if want[2] else nothing[4]
    dbias: list[Any] = [next(found) for _ in bias] if want[3] else nothing[6]
    return dx, nothing[1], None, da, db, None, dbias, None, None, None, None, None


_lora_mlp.register_autograd(_backward, setup_context=_setup)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    act: str,
    keep_x: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_rate: float = 1.0,
) -> Tensor:
    """y (…, out) of x (…, in) through gate and up (F, in) and down (out, F), all three adapted; act: one of glu.ACTS.

    keep_x (x's shape), keep_h (…, F): bool, dropout of the adapters' inputs, one mask for gate and up and one for down.
    Gradients go to x and to each a, b and bias. ValueError where shapes or `act` do not fit.
    """
    if act not in ACTS:
        raise ValueError(f"activation {act!r} is none of {', '.join(ACTS)}")
    if any(one.a is None for one in (gate, up, down)) or gate.base.shape != up.base.shape:
        raise ValueError("gate, up and down must all be adapted, and gate and up of one shape")
    check(x, [gate, up], keep_x)
    wide = (*x.shape[:-1], gate.base.shape[0])
    check(x.new_empty(wide, device="meta"), [down], keep_h)
    of = flat([gate, up, down])
    masks = [None if mask is None else mask.reshape(-1, mask.shape[-1]) for mask in (keep_x, keep_h)]
    found = _lora_mlp(
        x.reshape(-1, x.shape[-1]),
        of.base,
        of.layout,
        of.a,
        of.b,
        of.scales,
        of.bias,
        of.biased,
        *masks,
        keep_rate,
        act,
    )
    y: Tensor = found[0]
    return y.view(*x.shape[:-1], y.shape[-1])


def naive_lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    act: str,
    biases: Sequence[Tensor | None] = (None, None, None),
    keep_x: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_rate: float = 1.0,
) -> Tensor:
    """The definition in plain torch, of gate, up and down in this order: the oracle of `lora_mlp`."""
    named = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU(approximate="tanh")}
    gate, up = (naive_lora_linear(x, weights[i], a[i], b[i], scales[i], biases[i], keep_x, keep_rate) for i in range(2))
    h = named[act](gate) * up
    return naive_lora_linear(h, weights[2], a[2], b[2], scales[2], biases[2], keep_h, keep_rate)
