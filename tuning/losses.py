"""Losses as plain functions of token or sequence log-probabilities; every sum and mean over packs is the caller's."""

import torch
import torch.nn.functional as F


def sft_loss(logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""Weighted negative log-likelihood in sum form: -Σ_t w_t log p(y_t | y_<t, x).

    logps, weights: (N,), N the target tokens of a pack. Returns a scalar. The caller divides by the weight of its whole
    optimizer step, so that the loss is a mean over that step's targets however they are packed and accumulated.
    """
    return -(logps * weights).sum()


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Direct preference optimisation, sigmoid form (arXiv 2305.18290, equation 7).

    loss = -log σ(m),  m = β [log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x)]

    Each argument: (P,) log-probabilities of whole answers, summed over their tokens; w is chosen, l rejected; β is the
    strength of the tie to the reference. Returns losses (P,) and implicit reward margins m (P,), detached. Where policy
    and reference are equal the loss is exactly ln 2.
    """
    margins = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -F.logsigmoid(margins), margins.detach()


def sums_by_document(values: torch.Tensor, owners: torch.Tensor, documents: int) -> torch.Tensor:
    """(documents,) sums of `values` (N,) by the document that each belongs to; owners: (N,) in [0, documents)."""
    return torch.zeros(documents, dtype=values.dtype, device=values.device).index_add(0, owners, values)
