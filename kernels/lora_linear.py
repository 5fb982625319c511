"""The LoRA linear layer as one autograd operation over a frozen plain or NF4 weight (arXiv 2106.09685, 2305.14314).

    y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ

W (out, in) never gets a gradient. An NF4 base is dequantised into a buffer that all layers share, once in forward and
once in backward. The forward keeps x and s = drop(x) Aᵀ (r columns); the backward computes dY B once, for dA and dX.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nf4 import NF4, dequantise

Base = Tensor | NF4

# One growing buffer per device and dtype, and per thread: two threads would overwrite each other's weights.
_workspaces = threading.local()


def _workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = _workspaces.__dict__.setdefault("buffers", {})
    n = torch.Size(shape).numel()
    buffer = buffers.get((device, dtype))
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written in training
            buffer = buffers[device, dtype] = torch.empty(n, dtype=dtype, device=device)
    return buffer[:n].view(shape)


def plain_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """`base` as a tensor of `dtype`; where that takes a conversion, in the shared buffer, valid until the next call."""
    if isinstance(base, NF4):
        return dequantise(base, dtype, out=_workspace(base.shape, dtype, base.device))
    if base.dtype == dtype:
        return base.detach()
    return _workspace(tuple(base.shape), dtype, base.device).copy_(base.detach())


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Base,
        a: Tensor,
        b: Tensor,
        scale: float,
        bias: Tensor | None,
        keep: Tensor | None,
        keep_rate: float,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        s = _dropped(x2, keep, keep_rate) @ a.to(x.dtype).t()
        y = F.linear(x2, plain_weight(base, x.dtype), bias)
        y.addmm_(s, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x2, s, a, b, keep)
        ctx.base, ctx.scale, ctx.keep_rate, ctx.shape = base, scale, keep_rate, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x2, s, a, b, keep = ctx.saved_tensors
        dy = grads[0].reshape(-1, b.shape[0])
        dyb = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        dx = da = db = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ plain_weight(ctx.base, dy.dtype)
            if keep is None:
                dx.addmm_(dyb, a.to(dy.dtype))
            else:
                dx.addcmul_(dyb @ a.to(dy.dtype), keep.view(dx.shape).to(dx.dtype), value=1 / ctx.keep_rate)
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            da = (dyb.t() @ _dropped(x2, keep, ctx.keep_rate)).to(a.dtype)
        if ctx.needs_input_grad[3]:
            db = (dy.t() @ s).mul_(ctx.scale).to(b.dtype)
        if ctx.needs_input_grad[5]:
            dbias = dy.sum(dim=0)
        return dx, None, da, db, None, dbias, None, None


def _dropped(x2: Tensor, keep: Tensor | None, keep_rate: float) -> Tensor:
    return x2 if keep is None else (x2 * keep.view(x2.shape)).div_(keep_rate)


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
    """y (…, out) of x (…, in) by base W (out, in), a (r, in), b (out, r), bias (out).

    a and b may be of a wider dtype than x (fp32 master weights): the work is done in x's dtype, their gradients come in
    theirs. keep: bool, x's shape, dropout of the adapter's input; what is kept is divided by keep_rate. Gradients go to
    x, a, b and bias. ValueError where the shapes do not fit.
    """
    out, width = base.shape
    if x.shape[-1] != width or a.shape[1] != width or b.shape[0] != out or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, base {tuple(base.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} do not fit: "
            "want (…, in), (out, in), (r, in), (out, r)"
        )
    if keep is not None and keep.shape != x.shape:
        raise ValueError(f"keep {tuple(keep.shape)} must have the shape of x {tuple(x.shape)}")
    y: Tensor = _LoraLinear.apply(x, base, a, b, scale, bias, keep, keep_rate)  # type: ignore[no-untyped-call]
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
        ctx.base = base
        return F.linear(x, plain_weight(base, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        dx = dy @ plain_weight(ctx.base, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dy.reshape(-1, dy.shape[-1]).sum(dim=0) if ctx.needs_input_grad[2] else None


def frozen_linear(x: Tensor, base: Base, bias: Tensor | None = None) -> Tensor:
    """F.linear by a frozen plain or NF4 weight, bit for bit; gradients go to x and bias."""
    y: Tensor = _FrozenLinear.apply(x, base, bias)  # type: ignore[no-untyped-call]
    return y


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
    dropped = x if keep is None else x * keep / keep_rate
    low = F.linear(dropped, a.to(x.dtype))
    return F.linear(x, weight.detach(), bias) + scale * F.linear(low, b.to(x.dtype))
