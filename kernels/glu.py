"""The gated product h = act(gate) · up of a decoder's MLP, forward and backward, for SiLU and both forms of GELU.

The backward makes h again instead of keeping it. On CUDA one Triton kernel does each (glu_triton.py); elsewhere torch's
own operations work in as few buffers as they can.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import rows_in_cache

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "gelu": F.gelu,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": lambda dy, gate: torch.ops.aten.gelu_backward(dy, gate, approximate="tanh"),
    "gelu": torch.ops.aten.gelu_backward,
}
ACTS = tuple(_FORWARD)


def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of ACTS `function` computes, found by trying it on numbers; None where it is another."""
    probe = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        found = [name for name, act in _FORWARD.items() if torch.equal(function(probe), act(probe))]
    return found[0] if found else None


@cache
def _triton() -> Any:
    try:
        from . import glu_triton
    except ImportError:
        return None
    return glu_triton


def path_of(gate: Tensor, act: str) -> str:
    """ "triton" or "torch": what `glu` and `glu_backward` run for such a tensor."""
    contiguous = gate.is_contiguous() and gate.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return "triton" if gate.is_cuda and contiguous and act != "gelu" and _triton() is not None else "torch"


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) · up, both (T, F); act: one of ACTS."""
    if path_of(gate, act) == "triton" and up.is_contiguous():
        h: Tensor = _triton().glu(gate, up, act)
        return h
    if gate.is_cuda:
        return _FORWARD[act](gate).mul_(up)
    h = torch.empty_like(gate)
    for part in rows_in_cache(gate):
        torch.mul(_FORWARD[act](gate[part]), up[part], out=h[part])
    return h


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """h again, and the gradients of gate and up, of dh (T, F), which is overwritten."""
    if path_of(gate, act) == "triton" and up.is_contiguous() and dh.is_contiguous():
        found: tuple[Tensor, Tensor, Tensor] = _triton().glu_backward(dh, gate, up, act)
        return found
    if gate.is_cuda:
        dup = _FORWARD[act](gate)
        h = dup * up
        dup.mul_(dh)
        return h, _BACKWARD[act](dh.mul_(up), gate), dup
    h, dup = torch.empty_like(gate), torch.empty_like(gate)
    for part in rows_in_cache(gate):
        acted = _FORWARD[act](gate[part])
        torch.mul(acted, up[part], out=h[part])
        torch.mul(acted, dh[part], out=dup[part])
        dh[part] = _BACKWARD[act](dh[part].mul_(up[part]), gate[part])
    return h, dh, dup
