"""What the losses share: averages over an answer's tokens, stable logarithms, sums by document, bounds of options.

Log-probabilities arrive in fp32 or fp64; nothing here rounds them further, and a NaN that comes in goes out.
"""

import math

import torch

from ..curation.folder import HouseError

LN_2 = math.log(2.0)


def average(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of a token: sums / tokens, both (P,), tokens the summed target weights of each answer.

    An answer without weight (all of it masked) has a sum of 0 and the average 0, never 0/0.
    """
    return sums / torch.where(tokens == 0, torch.ones_like(tokens), tokens)


def log1mexp(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x <= 0, without cancellation at either end (Mächler 2012: the forms change over at -ln 2).

    x nearer to 0 than one unit of rounding is taken there (-1.2e-7 in fp32, value -15.9), with the gradient of that
    place: finite, and not zero, so that a token of probability 1 can still be pushed down.
    """
    at_most = -torch.finfo(logps.dtype).eps
    near = logps + (logps.clamp(max=at_most) - logps).detach()
    near = torch.where(torch.isfinite(logps), near, logps.clamp(max=at_most))
    small = near > -LN_2
    upper = torch.log(-torch.expm1(torch.where(small, near, torch.full_like(near, -LN_2))))
    lower = torch.log1p(-torch.exp(torch.where(small, torch.full_like(near, -LN_2), near)))
    return torch.where(small, upper, lower)


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of x = log p."""
    return logps - log1mexp(logps)


def sums_by_document(values: torch.Tensor, owners: torch.Tensor, documents: int) -> torch.Tensor:
    """(documents,) sums of `values` (N,) by the document that each belongs to; owners: (N,) in [0, documents)."""
    return torch.zeros(documents, dtype=values.dtype, device=values.device).index_add(0, owners, values)


def positive(**options: float) -> None:
    """A HouseError that names the first option that is not a finite number above 0."""
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise HouseError(f"{name} is {value}: it must be above 0")


def between(low: float, high: float, **options: float) -> None:
    """A HouseError that names the first option outside low <= value < high."""
    for name, value in options.items():
        if not low <= value < high:
            raise HouseError(f"{name} is {value}: it must be at least {low:g} and below {high:g}")
