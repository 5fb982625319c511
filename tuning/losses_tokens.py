"""Losses of supervised target tokens: (M,) log-probabilities and weights in, (M,) weighted losses out.

By name: `logps`: log p_t = log p(y_t | y_<t, x); `weights`: of each target, 1 or what a span says; `owners`: the answer
of each; `balance`: the factor of each target's task (`task_weights`). The caller sums and divides by the weight Σ w of
the whole optimizer step, so that the loss is a mean over its targets however they are packed and accumulated. A span of
weight 0 leaves tokens out and one of weight λ makes their part of a two-part loss (the rationale of Distilling
Step-by-Step, arXiv 2305.02301), so neither needs a function here.
"""

import torch

from .losses_math import between


def nll(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Weighted negative log-likelihood: cross-entropy on the trained tokens.

    -w_t log p_t
    """
    return -(logps * weights)


def fait(logps: torch.Tensor, weights: torch.Tensor, *, floor: float = 0.0) -> torch.Tensor:
    r"""Fault-aware fine-tuning (arXiv 2503.16913): tokens where right and wrong code differ weigh more while unlearnt.

    -[1 + (w_t - 1) d_t] log p_t,  d_t = floor + (1 - floor) (1 - p_t), without gradient, where w_t > 1; else as nll

    A span of weight w > 1 marks the differing tokens and says how much they weigh at most; the dynamic part d_t falls
    from 1 to `floor` as the model comes to expect the token. floor: from 0 to below 1. Divided, as every loss here, by
    the static weights. The paper's weight also looks at the likelihood of the faulty program, which a supervised row
    does not hold; the model's own doubt stands in for it.
    """
    between(0.0, 1.0, floor=floor)
    doubt = floor + (1.0 - floor) * -torch.expm1(logps.detach().clamp(max=0.0))
    return -logps * torch.where(weights > 1.0, 1.0 + (weights - 1.0) * doubt, weights)


def mft(logps: torch.Tensor, weights: torch.Tensor, balance: torch.Tensor, *, gamma: float = 0.0) -> torch.Tensor:
    r"""Multi-task fine-tuning of MFTCoder (arXiv 2311.02303): each task weighs the same.

    -b_t w_t (1 - p_t)^γ log p_t

    balance b_t: the factor of the target's task (`task_weights`); with it the step's mean is the mean over tasks of
    each task's mean. gamma: focal exponent (arXiv 1708.02002), 0 or at least 1; above 0 it turns towards tokens that
    the model finds hard.
    """
    if gamma == 0.0:
        return -(logps * weights * balance)
    between(1.0, float("inf"), gamma=gamma)
    return -(logps * weights * balance) * (-torch.expm1(logps.clamp(max=0.0))) ** gamma


def dft(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Dynamic fine-tuning (arXiv 2508.05629): the gradient is no longer larger for tokens thought unlikely.

    -w_t p_t log p_t,  without gradient through the factor p_t
    """
    return -(logps * weights * logps.detach().exp())


def task_weights(totals: torch.Tensor) -> torch.Tensor:
    r"""(T,) factors b of MFTCoder's balance (arXiv 2311.02303) from (T,) target weights of each task.

    b_k = Σ totals / (tasks present · totals_k); 0 for a task of which there is nothing. Then Σ_k b_k totals_k is
    Σ totals: dividing by the step's target weight makes the mean over tasks of each task's mean. totals: of one
    optimizer step over all packs and ranks.
    """
    present = totals > 0
    share = totals.sum() / present.sum().clamp(min=1)
    return torch.where(present, share / torch.where(present, totals, torch.ones_like(totals)), torch.zeros_like(totals))
