"""Root mean square norm (arXiv 1910.07467) as one autograd operation that keeps its input and one number a row.

With x̂ = x / sqrt(mean(x²) + eps) in fp32 and a weight w, decoders differ in where they round:

    rounded   w · round(x̂)            Llama, Mistral, Qwen, Phi 3, Granite
    plain     round(w · x̂)            OLMo 2, Helium
    shifted   round((1 + w) · x̂)      Gemma

round is to x's dtype. Written in torch's operations, each keeps an fp32 copy of x; here the backward makes x̂ again.
On CUDA one Triton kernel does each direction (rms_norm_triton.py). On a CPU the forward is torch's own operations on
rows that stay in the cache, bit for bit those of transformers; an x that fits the cache whole takes the definition.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .rows import rows_in_cache

Form = Literal["rounded", "plain", "shifted"]
FORMS: tuple[Form, ...] = get_args(Form)
LEAST = 1 << 20  # bytes of x on a CPU; forward and backward of 512 x 192 in fp32: 1.1 ms as defined, 1.6 ms by rows


@cache
def _triton() -> Any:
    try:
        from . import rms_norm_triton
    except ImportError:
        return None
    return rms_norm_triton


def path_of(x: Tensor) -> str:
    """ "triton", "rows" or "naive": what `rms_norm` runs for such a tensor."""
    if x.is_cuda and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and _triton() is not None:
        return "triton"
    return "rows" if x.nbytes >= LEAST else "naive"


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
    """The definition in plain torch, as transformers writes it: the oracle of `rms_norm`."""
    wide = x.to(torch.float32)
    hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rounded":
        return weight * hat.to(x.dtype)
    return (hat * _factor(weight, form)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
    """x (…, width) divided by the root of its mean square over the last dimension, times weight (width,).

    eps: added to the mean square. The result has x's dtype; in the form "rounded" the wider of x's and weight's.
    Gradients go to x and weight. ValueError where shapes or `form` do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} for rows of {x.shape[-1]} numbers")
    if path_of(x) == "naive":
        return naive_rms_norm(x, weight, eps, form)
    flat = x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    y = (_rms_norm if learns else _forward)(flat, weight, eps, form)[0]
    return y.view(x.shape)


def _factor(weight: Tensor, form: str) -> Tensor:
    """What x̂ is multiplied by, in fp32."""
    wide = weight.to(torch.float32)
    return 1.0 + wide if form == "shifted" else wide


def _outcome(x: Tensor, weight: Tensor, form: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if form == "rounded" else x.dtype


def _forward(x: Tensor, weight: Tensor, eps: float, form: str) -> list[Tensor]:
    """y (N, width), and 1 / sqrt(mean(x²) + eps) (N, 1) in fp32."""
    x = x.contiguous()
    y = x.new_empty(x.shape, dtype=_outcome(x, weight, form))
    inverse = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    if path_of(x) == "triton":
        _triton().forward(x, weight, eps, form, y, inverse)
        return [y, inverse]
    factor = weight if form == "rounded" else _factor(weight, form)
    for rows in rows_in_cache(x):
        wide = x[rows].to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        hat = wide * scale
        torch.mul(hat.to(x.dtype) if form == "rounded" else hat, factor, out=y[rows])
        inverse[rows] = scale
    return [y, inverse]


@torch.library.custom_op("gristmill::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> list[Tensor]:
    return _forward(x, weight, eps, form)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, form: str) -> list[Tensor]:
    y = x.new_empty(x.shape, dtype=_outcome(x, weight, form))
    return [y, x.new_empty((x.shape[0], 1), dtype=torch.float32)]


@torch.library.custom_op("gristmill::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: str, want: Sequence[int]
) -> list[Tensor]:
    """dx (N, width) and dweight (width,): those that `want` (x, weight) asks for.

    With g = dy · factor: dx = (g - x̂ · mean(g · x̂)) / sqrt(mean(x²) + eps), dweight = Σ dy · x̂ over rows, in fp32.
    """
    dy, x = dy.contiguous(), x.contiguous()
    if path_of(x) == "triton":
        found: list[Tensor] = _triton().backward(dy, x, weight, inverse, form, want)
        return found
    factor, dx = _factor(weight, form), torch.empty_like(x) if want[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32)
    for rows in rows_in_cache(x):
        hat, dhat = x[rows].to(torch.float32) * inverse[rows], dy[rows].to(torch.float32)
        if want[1]:
            dweight += (dhat * hat).sum(0)
        if dx is not None:
            dhat = dhat * factor
            mean = (dhat * hat).mean(-1, keepdim=True)
            dx[rows] = dhat.addcmul_(hat, mean, value=-1.0).mul_(inverse[rows])
    return ([] if dx is None else [dx]) + ([dweight.to(weight.dtype)] if want[1] else [])


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, form: str, want: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(one) for one, wanted in zip((x, weight), want, strict=True) if wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, _, ctx.form = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if grads[0] is None:
        return None, None, None, None
    x, weight, inverse = ctx.saved_tensors
    want = [int(wanted) for wanted in ctx.needs_input_grad[:2]]
    found = iter(_rms_norm_backward(grads[0], x, weight, inverse, ctx.form, want))
    dx, dweight = (next(found) if wanted else None for wanted in want)
    return dx, dweight, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
