"""The losses by name. A loss is a plain function: what it needs is what its positional parameters are called, tensors
that the loop fills in; keyword-only parameters with defaults are its options in the recipe.

Families, by a parameter: `rejected` -> pairs (losses_pairs.py), `desirable` -> unpaired (losses_unpaired.py), `rewards`
-> lists (losses_lists.py), else `weights` -> tokens (losses_tokens.py). A parameter `ref_…` asks for the reference. A
loss of one's own needs no entry here: a recipe names it by its dotted path.
"""

from collections.abc import Callable

import torch

from . import losses_lists, losses_pairs, losses_tokens, losses_unpaired
from .losses_math import sums_by_document as sums_by_document

Loss = Callable[..., torch.Tensor]

LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        losses_pairs.dpo,
        losses_pairs.robust_dpo,
        losses_pairs.ipo,
        losses_pairs.hinge,
        losses_pairs.orpo,
        losses_pairs.simpo,
        losses_pairs.cpo,
        losses_pairs.apo_zero,
        losses_pairs.apo_down,
        losses_pairs.rpo,
        losses_pairs.dpo_norm,
        losses_pairs.asft,
        losses_pairs.exo_pair,
        losses_pairs.nca_pair,
        losses_pairs.sppo_hard,
        losses_pairs.discopop,
        losses_unpaired.kto,
        losses_unpaired.apo_zero_unpaired,
        losses_unpaired.fdpo,
        losses_lists.tpo,
        losses_lists.plackett_luce,
        losses_lists.copg,
        losses_lists.rrhf,
        losses_tokens.nll,
        losses_tokens.fait,
        losses_tokens.mft,
        losses_tokens.dft,
    )
}


def sft_loss(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Weighted negative log-likelihood in sum form: -Σ_t w_t log p(y_t | y_<t, x).

    logps, weights: (N,), N the target tokens of a pack. Returns a scalar. The caller divides by the weight of its whole
    optimizer step, so that the loss is a mean over that step's targets however they are packed and accumulated.
    """
    return -(logps * weights).sum()
