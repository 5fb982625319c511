"""Modules that stand in a transformers decoder where its linear layers stood: frozen, adapted, and gated MLPs.

Layers that read the same input (q, k and v; gate and up) take one operation together, yet stay modules of their own
under their old names: the first that is called computes for all, the others hand out what waits for them.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.lora_linear import Base, Projection, frozen_linear, lora_group
from ..kernels.lora_mlp import lora_mlp
from ..kernels.nf4 import NF4, dequantise, quantise
from .settings import Lora

PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FrozenLinear(nn.Module):
    """A frozen linear layer; base: how the weight is kept, as in settings.Lora.

    The weight is a frozen parameter `weight` (out, in) or, in NF4, buffers.
    """

    def __init__(self, linear: nn.Linear, base: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._nf4: NF4 | None = None
        self.weight: nn.Parameter | None = None
        if base in PLAIN:
            self.weight = nn.Parameter(linear.weight.detach().to(PLAIN[base]), requires_grad=False)
        else:
            stored = getattr(linear, "nf4", None)  # of a checkpoint that is NF4 already: not quantised twice
            self._nf4 = stored if isinstance(stored, NF4) else quantise(linear.weight.detach(), double=base == "nf4")
            for name, tensor in self._nf4.tensors().items():
                self.register_buffer(f"nf4_{name}", tensor, persistent=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def base(self) -> Base:
        """The frozen weight, as stored."""
        if self._nf4 is None:
            assert self.weight is not None
            return self.weight
        if self.nf4_packed is not self._nf4.packed:  # the module was moved
            tensors: dict[str, Any] = {name: getattr(self, f"nf4_{name}") for name in self._nf4.tensors()}
            self._nf4 = replace(self._nf4, **tensors)
        return self._nf4

    def unpack(self) -> None:
        """Stores an NF4 base dequantised: the same values, without the work of each call."""
        if self._nf4 is None:
            return
        q = cast(NF4, self.base)
        self.weight = nn.Parameter(dequantise(q), requires_grad=False)
        for name in q.tensors():
            delattr(self, f"nf4_{name}")
        self._nf4 = None

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.base, self.bias)

    def extra_repr(self) -> str:
        kind = "nf4" if self._nf4 is not None else "plain"
        return f"{self.in_features} -> {self.out_features}, base {kind}"


class LoraLinear(FrozenLinear):
    """A frozen linear layer with a low-rank update: y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ.

    A (rank, in) and B (out, rank) are fp32 parameters; scale is alpha / rank, with rsLoRA alpha / sqrt(rank). Dropout
    draws from torch's global generator, which each training step seeds: one mask for layers that share their input.
    """

    def __init__(self, linear: nn.Linear, settings: Lora, generator: torch.Generator) -> None:
        super().__init__(linear, settings.base)
        self.alpha, self.dropout = settings.alpha, settings.dropout
        self.scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        self.active = True
        self.shared: SharedInput | None = None
        device = self.base.device
        a = torch.empty(settings.rank, linear.in_features)
        if settings.init == "gaussian":
            nn.init.normal_(a, std=1 / settings.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, settings.rank, device=device))

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def projection(self) -> Projection:
        return Projection(self.base, self.A, self.B, self.scale, self.bias)

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Which entries of the adapter's input stay; None where nothing is dropped."""
        if not (self.training and self.dropout):
            return None
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - self.dropout)

    def alone(self, x: Tensor) -> Tensor:
        return lora_group(x, [self.projection()], self.mask(x.shape, x.device), 1.0 - self.dropout)[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        return self.alone(x) if self.shared is None else self.shared.output(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"


class SharedInput:
    """Adapted layers of one parent that its forward calls in this order on the same tensor.

    The first computes for all; each of the others takes its output if it is called on that very tensor, and computes
    alone if not.
    """

    def __init__(self, members: list[LoraLinear]) -> None:
        self.members = members
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None

    def output(self, member: LoraLinear, x: Tensor) -> Tensor:
        place = next(index for index, one in enumerate(self.members) if one is member)
        if place == 0:
            return self._all(x)
        waiting = self.waiting
        if waiting is None or waiting[0] is not x or place not in waiting[1]:
            return member.alone(x)
        found = waiting[1].pop(place)
        if not waiting[1]:
            self.waiting = None
        return found

    def _all(self, x: Tensor) -> Tensor:
        if not all(one.active for one in self.members):
            return self.members[0].alone(x)
        first = self.members[0]
        outputs = lora_group(
            x, [one.projection() for one in self.members], first.mask(x.shape, x.device), 1.0 - first.dropout
        )
        self.waiting = (x, dict(enumerate(outputs[1:], start=1)))
        return outputs[0]


class LoraMlp(nn.Module):
    """down(act(gate(x)) · up(x)) by the fused operation, its three layers adapted; as written where one is not active.

    The layers keep their names; act: what `act_fn` computes, one of kernels.glu.ACTS.
    """

    def __init__(self, gate: LoraLinear, up: LoraLinear, down: LoraLinear, act_fn: nn.Module, act: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn, self.act = gate, up, down, act_fn, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not (gate.active and up.active and down.active):
            return gated(self, x)
        wide = torch.Size((*x.shape[:-1], gate.out_features))
        return lora_mlp(
            x, gate.projection(), up.projection(), down.projection(), self.act,
            gate.mask(x.shape, x.device), down.mask(wide, x.device), 1.0 - down.dropout,
        )  # fmt: skip


def gated(mlp: nn.Module, x: Tensor) -> Tensor:
    """What a gated MLP of transformers computes, of its own modules."""
    gate, up, down, act = (cast(Callable[[Tensor], Tensor], getattr(mlp, name)) for name in GATED)
    return down(act(gate(x)) * up(x))


GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
