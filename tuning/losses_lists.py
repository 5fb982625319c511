"""Losses of lists: a prompt with any number of answers, each with a reward.

By name: `logps`, `ref_logps`: (K,) log-probabilities of the answers of all lists, summed over tokens times weights;
`tokens`: (K,) sums of those weights; `rewards`: (K,); `owners`: (K,) the list of each answer, 0 to `lists` - 1;
`lists`: their number. Below, ρ = log π/π_ref. Losses (lists,); the mean over a step's lists is the caller's. A list of
one answer, or of equal rewards, has nothing to rank. A reward that is not finite makes its list's loss NaN.

Pairs are taken as a (K, K) table over the answers of one pack, without a step on the host; another list's answers and
pairs of the wrong order are zeros in it.
"""

import torch
import torch.nn.functional as F

from .losses_math import average, positive, sums_by_document


def tpo(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    owners: torch.Tensor,
    lists: int,
    *,
    beta: float = 0.1,
    margin: float = 0.0,
) -> torch.Tensor:
    r"""Tree preference optimisation (arXiv 2410.12854): every pair of a list, with LambdaRank's weights (2402.01878).

    Σ_{v_i > v_j} λ_ij · -log σ(s_i - s_j - γ (v_i - v_j)),  s = β ρ
    λ_ij = |2^v_i - 2^v_j| · |1 / log(1 + τ_i) - 1 / log(1 + τ_j)|

    v: the rewards, brought to [0, 1] within each list, so that their unit does not matter. τ_i: the place (from 1) of
    answer i by s, ties by order; λ has no gradient. margin γ: grows with the gap between rewards. The adaptive step
    rewards are the weights of spans, one a step: they enter ρ = Σ_t w_t log π/π_ref. A sum over pairs, not their mean.
    """
    positive(beta=beta)
    scores = beta * (logps - ref_logps)
    values = _scaled(rewards, owners, lists).to(scores.dtype)
    gains = torch.exp2(values)
    discounts = 1.0 / torch.log1p(_places(scores.detach(), owners).to(scores.dtype))
    weights = _gaps(gains).abs() * _gaps(discounts).abs()
    losses = -F.logsigmoid(_gaps(scores) - margin * _gaps(values)) * weights
    return _sums_of_pairs(losses, _better(rewards, owners), rewards, owners, lists)


def plackett_luce(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    owners: torch.Tensor,
    lists: int,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""DPO of whole rankings, the Plackett-Luce form (arXiv 2305.18290, appendix A.3); ListMLE in ranking.

    -Σ_k log [exp(s_k) / Σ_{j ranked k or lower} exp(s_j)],  s = β ρ, k from the highest reward down

    Equal rewards are ranked by order. A list of two answers gives DPO.
    """
    positive(beta=beta)
    scores = beta * (logps - ref_logps)
    places = _places(rewards, owners)
    left = _together(owners) & (places[None, :] >= places[:, None])
    rivals = torch.where(left, scores[None, :], torch.full_like(scores, -torch.inf)[None, :])
    losses = torch.logsumexp(rivals, 1) - scores + 0.0 * rewards
    return sums_by_document(losses, owners, lists)


def copg(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    rewards: torch.Tensor,
    owners: torch.Tensor,
    lists: int,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Contrastive policy gradient (arXiv 2406.19185): the mean over a list's pairs of the squared gap.

    mean_{i < j} ½ [(r_i - r_j) - β (ρ_i - ρ_j)]²

    Its gradient is the policy gradient of the regularised reward r - β ρ with the other answer's as the baseline, times
    β. Rewards enter as they are: β is in their unit per nat. Two answers whose rewards differ by ½ give IPO without
    its division by tokens, times β² / 2.
    """
    positive(beta=beta)
    losses = 0.5 * _gaps(rewards.to(logps.dtype) - beta * (logps - ref_logps)).square()
    once = torch.triu(_together(owners), diagonal=1)
    count = sums_by_document(once.sum(1).to(losses.dtype), owners, lists)
    return average(_sums_of_pairs(losses, once, rewards, owners, lists), count)


def rrhf(
    logps: torch.Tensor,
    tokens: torch.Tensor,
    rewards: torch.Tensor,
    owners: torch.Tensor,
    lists: int,
    *,
    alpha: float = 1.0,
) -> torch.Tensor:
    r"""Rank responses (RRHF, arXiv 2304.05302); no reference.

    Σ_{r_i > r_j} max(0, log p̄_j - log p̄_i) - α log π(y_best|x),  log p̄ = log π(y|x) / tokens

    alpha: weight of the likelihood of the best answer, a sum over its tokens as in the paper.
    """
    losses = torch.relu(-_gaps(average(logps, tokens)))
    ranked = _sums_of_pairs(losses, _better(rewards, owners), rewards, owners, lists)
    best = torch.where(_places(rewards, owners) == 1, logps, torch.zeros_like(logps))
    return ranked - alpha * sums_by_document(best, owners, lists)


def _gaps(values: torch.Tensor) -> torch.Tensor:
    """(K, K) values_i - values_j."""
    return values[:, None] - values[None, :]


def _together(owners: torch.Tensor) -> torch.Tensor:
    """(K, K) whether two answers are of the same list."""
    return owners[:, None] == owners[None, :]


def _better(rewards: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """(K, K) whether i and j are of the same list and i has the higher reward."""
    return _together(owners) & (rewards[:, None] > rewards[None, :])


def _sums_of_pairs(
    losses: torch.Tensor, chosen: torch.Tensor, rewards: torch.Tensor, owners: torch.Tensor, lists: int
) -> torch.Tensor:
    """(lists,) sums of the `chosen` cells of `losses` (K, K), NaN for a list with a reward that is not finite."""
    rows = torch.where(chosen, losses, torch.zeros_like(losses)).sum(1)
    return sums_by_document(rows + 0.0 * rewards, owners, lists)


def _places(values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """(K,) the place of each answer in its own list, from 1, by descending value, equal ones by order."""
    order = torch.arange(len(values), device=values.device)
    ahead = values[None, :] > values[:, None]
    ahead |= (values[None, :] == values[:, None]) & (order[None, :] < order[:, None])
    return 1 + (ahead & _together(owners)).sum(1)


def _scaled(rewards: torch.Tensor, owners: torch.Tensor, lists: int) -> torch.Tensor:
    """Rewards brought to [0, 1] within each list; equal ones to 0."""
    edge = torch.full((lists,), torch.inf, dtype=rewards.dtype, device=rewards.device)
    low = edge.scatter_reduce(0, owners, rewards, "amin")
    high = (-edge).scatter_reduce(0, owners, rewards, "amax")
    return average(rewards - low[owners], (high - low)[owners])
