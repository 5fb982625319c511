"""Losses of single answers that were found good or bad, and what KTO compares them with.

By name: `logps`, `ref_logps`: (U,) log-probabilities of whole answers under policy and reference, summed over tokens
times their weights; `tokens`: (U,) sums of those weights; `desirable`: (U,) bool; `kl`: a scalar without gradient, of
the whole optimizer step (`kto_kl`). Below, ρ = log π/π_ref. Losses (U,); the mean over a step's rows is the caller's.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .losses_math import positive


def kto(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    r"""Kahneman-Tversky optimisation (arXiv 2402.01306, equation 7).

    desirable: λ_D σ(-β (ρ - z)),  undesirable: λ_U σ(-β (z - ρ))

    kl: the reference point z of the step (`kto_kl`). beta: risk aversion. desirable_weight λ_D, undesirable_weight λ_U:
    the paper balances them so that λ_D n_D / (λ_U n_U) lies from 1 to 3/2. A loss lies between 0 and its weight.
    """
    positive(beta=beta)
    gains = beta * (logps - ref_logps - kl.detach())
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gains), undesirable_weight * torch.sigmoid(gains))


def apo_zero_unpaired(
    logps: torch.Tensor, ref_logps: torch.Tensor, desirable: torch.Tensor, *, beta: float = 0.1
) -> torch.Tensor:
    r"""APO-zero of single answers (arXiv 2408.06266, equation 7): `kto` with the reference point 0.

    desirable: σ(-β ρ),  undesirable: σ(β ρ)
    """
    positive(beta=beta)
    gains = beta * (logps - ref_logps)
    return torch.sigmoid(torch.where(desirable, -gains, gains))


def fdpo(logps: torch.Tensor, ref_logps: torch.Tensor, desirable: torch.Tensor, *, beta: float = 0.5) -> torch.Tensor:
    r"""Fine-grained DPO without pairs (FDPO of M-HalDetect, arXiv 2308.06394).

    desirable: -log σ(β ρ),  undesirable: -log σ(-β ρ)

    One segment a row; spans of weight 0 leave the rest of the answer out.
    """
    positive(beta=beta)
    gains = beta * (logps - ref_logps)
    return -F.logsigmoid(torch.where(desirable, gains, -gains))


def kto_kl(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> torch.Tensor:
    r"""KTO's reference point z of one optimizer step: max(0, mean log π/π_ref of mismatched answers), no gradient.

    logps, ref_logps: (N,) log-probabilities of answers to prompts that they were not written for (`kto_mismatch`), all
    of this rank's part of the step, whole answers summed over tokens. total: sums over packs and ranks (`World.total`);
    given the tensor [Σ ρ, N]. A step without any mismatched answer has z = 0. A scalar.
    """
    ratios = (logps - ref_logps).detach()
    sums = total(torch.stack([ratios.sum(), torch.full_like(ratios.sum(), ratios.numel())]))
    return torch.clamp(sums[0] / sums[1].clamp(min=1.0), min=0.0)


def kto_mismatch(units: int) -> NDArray[np.int64]:
    """(units,) for each unit of an optimizer step, in the step's order, the unit whose answer its prompt is given.

    Half a turn of the ring: no unit keeps its own answer, each answer is used once, and neighbours (which often share
    their prompt) are not swapped. One unit alone has no mismatch: (0,).
    """
    return np.roll(np.arange(units), -(units // 2)) if units > 1 else np.empty(0, np.int64)
