"""Losses of preference pairs: (P,) log-probabilities of whole answers in, (P,) losses out.

What every function takes, by name: `chosen`, `rejected`: log π(y|x), summed over the answer's tokens, each times its
target weight; `ref_chosen`, `ref_rejected`: the same under the reference; `chosen_tokens`, `rejected_tokens`: the sums
of those weights (the answer's tokens where no span weighs them). A function takes what it needs; the rest costs
nothing. Below, ρ_w and ρ_l are the log-ratios log π/π_ref of the chosen and the rejected answer, Δ = ρ_w - ρ_l, and p̄
the geometric mean of an answer's token probabilities, log p̄ = log π(y|x) / tokens.

A loss is per pair and never depends on which pairs share a pack; the mean over a step's pairs is the caller's. Hence
left out: AOT (arXiv 2406.05882), which sorts the log-ratios of a batch, and BCO (arXiv 2404.04656), whose reward shift
is a running mean over steps. Step-DPO (2406.18629), Mask-DPO (2503.02846) and DDPO (2312.00849) need no function of
their own: spans of weight 0, or of a weight above 1, with `dpo` or `dpo_norm`.
"""

import torch
import torch.nn.functional as F

from .losses_math import average, between, log1mexp, log_odds, positive


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""Direct preference optimisation (arXiv 2305.18290, equation 7); smoothed, conservative DPO (Mitchell 2023).

    -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)

    beta: the tie to the reference. label_smoothing ε: the share of labels believed flipped, below 0.5. Where policy and
    reference are equal the loss is ln 2. Not normalised by length.
    """
    positive(beta=beta)
    between(0.0, 0.5, label_smoothing=label_smoothing)
    return _preferred(beta * _delta(chosen, rejected, ref_chosen, ref_rejected), label_smoothing)


def robust_dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    r"""DPO unbiased under flipped labels (arXiv 2403.00409).

    [-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)] / (1 - 2 ε)

    label_smoothing ε: the rate of flips, below 0.5; 0 is DPO. The loss of a pair may be negative; its mean is not.
    """
    positive(beta=beta)
    between(0.0, 0.5, label_smoothing=label_smoothing)
    margins = beta * _delta(chosen, rejected, ref_chosen, ref_rejected)
    right, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1.0 - label_smoothing) * right - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Identity preference optimisation (arXiv 2310.12036, equation 17).

    (ρ_w / tokens_w - ρ_l / tokens_l - 1 / (2 β))²

    beta: the paper's τ. Log-ratios are means over the tokens of their own answer, as the authors have confirmed to TRL.
    """
    positive(beta=beta)
    margins = average(chosen - ref_chosen, chosen_tokens) - average(rejected - ref_rejected, rejected_tokens)
    return (margins - 0.5 / beta).square()


def hinge(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""The hinge of SLiC (arXiv 2305.10425) on log-ratios, as RSO has it (arXiv 2309.06657).

    max(0, 1 - β Δ)

    beta: 1/β is the margin wanted, in nats.
    """
    positive(beta=beta)
    return torch.relu(1.0 - beta * _delta(chosen, rejected, ref_chosen, ref_rejected))


def orpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Odds ratio preference optimisation (arXiv 2403.07691, equations 4 and 7); no reference.

    -log p̄_w - β log σ(log odds(p̄_w) - log odds(p̄_l)),  odds(p) = p / (1 - p)

    beta: the paper's λ, the weight of the odds ratio beside the likelihood of the chosen answer. Normalised by tokens.
    """
    positive(beta=beta)
    likely, unlikely = average(chosen, chosen_tokens), average(rejected, rejected_tokens)
    return -likely - beta * F.logsigmoid(log_odds(likely) - log_odds(unlikely))


def simpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    r"""Simple preference optimisation (arXiv 2405.14734); no reference.

    -log σ(β (log p̄_w - log p̄_l) - γ)

    beta: scale of the reward. gamma: the margin wanted (the paper advises γ/β from 0.2 to 0.8). Normalised by tokens.
    """
    positive(beta=beta)
    margins = average(chosen, chosen_tokens) - average(rejected, rejected_tokens)
    return -F.logsigmoid(beta * margins - gamma)


def cpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""Contrastive preference optimisation (arXiv 2401.08417, equation 3); no reference.

    -(1 - ε) log σ(β m) - ε log σ(-β m) - α log p̄_w,  m = log π(y_w|x) - log π(y_l|x)

    alpha: weight of the likelihood of the chosen answer, a mean over its tokens. label_smoothing ε as in `dpo`.
    """
    positive(beta=beta)
    between(0.0, 0.5, label_smoothing=label_smoothing)
    return _preferred(beta * (chosen - rejected), label_smoothing) - alpha * average(chosen, chosen_tokens)


def apo_zero(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Anchored preference optimisation, zero (arXiv 2408.06266, equation 7): chosen up, rejected down.

    σ(-β ρ_w) + σ(β ρ_l)

    For chosen answers better than the model's own. The loss lies between 0 and 2.
    """
    positive(beta=beta)
    return torch.sigmoid(-beta * (chosen - ref_chosen)) + torch.sigmoid(beta * (rejected - ref_rejected))


def apo_down(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Anchored preference optimisation, down (arXiv 2408.06266, equation 8): both down, the rejected one more.

    σ(β ρ_w) + σ(-β Δ)

    For chosen answers worse than the model's own. The loss lies between 0 and 2.
    """
    positive(beta=beta)
    delta = _delta(chosen, rejected, ref_chosen, ref_rejected)
    return torch.sigmoid(beta * (chosen - ref_chosen)) + torch.sigmoid(-beta * delta)


def rpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> torch.Tensor:
    r"""DPO with the likelihood of the chosen answer (iterative RPO, arXiv 2404.19733).

    -log σ(β Δ) - α log p̄_w

    alpha: weight of the likelihood, a mean over the answer's tokens (the paper weighs the DPO term instead: 1/α).
    """
    positive(beta=beta)
    margins = beta * _delta(chosen, rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid(margins) - alpha * average(chosen, chosen_tokens)


def dpo_norm(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""Length-normalised DPO, as TÜLU 3 trains (arXiv 2411.15124).

    -(1 - ε) log σ(m) - ε log σ(-m),  m = β (ρ_w / tokens_w - ρ_l / tokens_l)

    beta: 5 in TÜLU 3; means over tokens are small numbers. With spans of weight γ on corrected segments this is DDPO
    of RLHF-V (arXiv 2312.00849).
    """
    positive(beta=beta)
    between(0.0, 0.5, label_smoothing=label_smoothing)
    margins = average(chosen - ref_chosen, chosen_tokens) - average(rejected - ref_rejected, rejected_tokens)
    return _preferred(beta * margins, label_smoothing)


def asft(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    *,
    beta: float = 1.0,
) -> torch.Tensor:
    r"""Aligned supervised fine-tuning (arXiv 2409.10571): absolute likelihoods, no reference and no Bradley-Terry.

    -log p̄_w + β [-log σ(log odds(p̄_w)) - log σ(-log odds(p̄_l))]  =  -(1 + β) log p̄_w - β log(1 - p̄_l)

    beta: weight of the alignment terms beside the SFT term. Computed in the second form, which never takes odds: σ of
    the log-odds of p is p. Normalised by tokens.
    """
    positive(beta=beta)
    likely, unlikely = average(chosen, chosen_tokens), average(rejected, rejected_tokens)
    return -(1.0 + beta) * likely - beta * log1mexp(unlikely)


def exo_pair(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> torch.Tensor:
    r"""Efficient exact optimisation on pairs (arXiv 2402.00856, equation 16): the reverse Kullback-Leibler divergence.

    q [log q - log(1 - ε)] + (1 - q) [log(1 - q) - log ε],  q = σ(β Δ)

    label_smoothing ε: above 0 and below 0.5; the preference that is matched is (1 - ε, ε).
    """
    positive(beta=beta, label_smoothing=label_smoothing)
    between(0.0, 0.5, label_smoothing=label_smoothing)
    margins = beta * _delta(chosen, rejected, ref_chosen, ref_rejected)
    smoothing = torch.as_tensor(label_smoothing, dtype=margins.dtype, device=margins.device)
    right = torch.sigmoid(margins) * (F.logsigmoid(margins) - torch.log1p(-smoothing))
    return right + torch.sigmoid(-margins) * (F.logsigmoid(-margins) - smoothing.log())


def nca_pair(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Noise-contrastive alignment on pairs (arXiv 2402.05369, K = 2).

    -log σ(β ρ_w) - ½ log σ(-β ρ_w) - ½ log σ(-β ρ_l)
    """
    positive(beta=beta)
    up, down = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(up) - 0.5 * (F.logsigmoid(-up) + F.logsigmoid(-down))


def sppo_hard(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Self-play preference optimisation with certain wins (arXiv 2405.00675, equation 4.7 with P = 1 and 0).

    (ρ_w - 1 / (2 β))² + (ρ_l + 1 / (2 β))²

    beta: the inverse of the paper's η.
    """
    positive(beta=beta)
    return (chosen - ref_chosen - 0.5 / beta).square() + (rejected - ref_rejected + 0.5 / beta).square()


def discopop(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> torch.Tensor:
    r"""The loss that DiscoPOP discovered (arXiv 2406.08414, equation 5): logistic and exponential, blended.

    -(1 - g) log σ(β Δ) + g exp(-β Δ),  g = σ(β Δ / τ)

    tau: below 1; how sharp the blend is at β Δ = 0. The second term is taken as exp(log g - β Δ), which cannot
    overflow.
    """
    positive(beta=beta)
    between(1e-6, 1.0, tau=tau)
    margins = beta * _delta(chosen, rejected, ref_chosen, ref_rejected)
    blend = margins / tau
    return -torch.sigmoid(-blend) * F.logsigmoid(margins) + torch.exp(F.logsigmoid(blend) - margins)


def _delta(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor
) -> torch.Tensor:
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _preferred(margins: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log σ(m), or mixed with its mirror image; without smoothing the mirror is not computed: 0 · ∞ is NaN."""
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return losses
