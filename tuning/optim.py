"""Optimizers and learning rates: AdamW from torch, Lion, the groups that decay or learn faster, and the schedules."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .settings import Training


class Lion(torch.optim.Optimizer):
    """Lion (Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, program 1): the sign of a momentum.

    c = β₁ m + (1 - β₁) g;  θ ← θ - η (sign(c) + λ θ);  m ← β₂ m + (1 - β₂) g. One state a weight instead of AdamW's
    two. Its state `momentum` has the weight's dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Lion takes no closure")
        for group in self.param_groups:
            fast, slow = group["betas"]
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["momentum"] for p in parameters]
            updates = torch._foreach_mul(momenta, fast)
            torch._foreach_add_(updates, gradients, alpha=1 - fast)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - slow)


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """The optimizer of a stage. Matrices alone decay; a group's `scale` multiplies the schedule's rate: that of LoRA's
    B matrices is LoRA+'s ratio (arXiv 2402.12354)."""
    ratio = 1.0 if settings.lora is None else settings.lora.lora_plus_ratio
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = ratio if settings.lora is not None and name.endswith(".B") else 1.0
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    listed = [{"params": found, "weight_decay": decay, "scale": scale} for (scale, decay), found in groups.items()]
    if settings.optimizer == "lion":
        return Lion(listed, lr=settings.learning_rate)
    return torch.optim.AdamW(listed, lr=settings.learning_rate, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(settings: Training, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: rises linearly over the warm-up steps, then as the schedule says. What falls
    reaches zero after the last step."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / (warm + 1)
    return settings.learning_rate * _shape(settings, step, steps, warm)


def _shape(settings: Training, step: int, steps: int, warm: int) -> float:
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    falling = math.ceil(settings.decay * steps) if settings.schedule == "wsd" else steps - warm
    return min(1.0, (steps - step) / max(falling, 1))
