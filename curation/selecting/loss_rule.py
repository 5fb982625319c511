"""A linear rule from indicators of a data set to the logarithm of the loss after tuning on it, fitted by least squares
on runs of one's own (InstructMining, Cao et al., arXiv 2307.06290)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..folder import HouseError

Term = tuple[str, float]


@dataclass(frozen=True)
class Rule:
    """log(loss) = intercept + sum of weight · indicator. Standard errors are those of ordinary least squares;
    `spread` is the residuals' standard deviation, `r2` the share of variance explained."""

    intercept: float
    terms: tuple[Term, ...]
    intercept_error: float
    errors: tuple[float, ...]
    spread: float
    r2: float
    runs: int


# What the authors fitted on Llama: in the first version of the paper (Rew: a reward model's score; Len: words of the
# response; Knn_6: distance to the sixth nearest neighbour) and in the third (UniEval's understandability, naturalness,
# coherence).
FIRST = (1.0694, (("reward", -0.1498), ("output_length", 8.257e-5), ("knn_6", -0.9350)))
THIRD = (
    0.0274,
    (("reward", -0.0078), ("understandability", 0.4421), ("naturalness", -0.3212), ("coherence", -0.1520)),
)


def fit_rule(runs: Sequence[Mapping[str, float]], indicators: Sequence[str], loss: str = "loss") -> Rule:
    """The rule that fits `runs` best: each one the means of the indicators over the data it tuned on, and its
    evaluation loss. A HouseError where there are too few runs, a number is missing, or the indicators do not vary
    independently."""
    names = list(indicators)
    missing = sorted({name for run in runs for name in (*names, loss) if not np.isfinite(run.get(name, np.nan))})
    if missing:
        raise HouseError(f"runs without a number for {', '.join(missing)}")
    if len(runs) <= len(names) + 1:
        raise HouseError(f"{len(runs)} runs cannot fit {len(names)} indicators: give at least {len(names) + 2}")
    losses = np.array([run[loss] for run in runs], np.float64)
    if (losses <= 0).any():
        raise HouseError(f"the column {loss} holds {losses.min()}: a loss is above 0")
    table = np.array([[run[name] for name in names] for run in runs], np.float64)
    centre, scale = table.mean(axis=0), table.std(axis=0)
    if names and (not (scale > 0).all() or np.linalg.cond((table - centre) / scale) > 1e8):
        raise HouseError(f"the runs do not vary {', '.join(names)} independently: leave one out or add runs")
    design = np.column_stack([np.ones(len(runs)), (table - centre) / np.where(scale > 0, scale, 1)])
    target = np.log(losses)
    q, r = np.linalg.qr(design)
    inverse = np.linalg.inv(r)
    fitted = inverse @ (q.T @ target)
    residual = target - design @ fitted
    variance = residual @ residual / (len(runs) - design.shape[1])
    back = np.zeros((design.shape[1], design.shape[1]))  # from standardised indicators to those that were given
    back[0, 0], back[0, 1:] = 1, -centre / scale
    back[1:, 1:] = np.diag(1 / scale)
    weights = back @ fitted
    root = back @ inverse
    errors = np.sqrt(variance * (root * root).sum(axis=1))
    total = ((target - target.mean()) ** 2).sum()
    return Rule(
        intercept=float(weights[0]),
        terms=tuple(zip(names, map(float, weights[1:]), strict=True)),
        intercept_error=float(errors[0]),
        errors=tuple(map(float, errors[1:])),
        spread=float(np.sqrt(variance)),
        r2=float(1 - residual @ residual / total) if total > 0 else 1.0,
        runs=len(runs),
    )


def neighbour_distance(vectors: np.ndarray, k: int, block: int = 1024) -> np.ndarray:
    """Distance of each unit vector to its k-th nearest other one, exactly; NaN where there are fewer. Quadratic in the
    rows, a block of them at a time."""
    rows = len(vectors)
    found = np.full(rows, np.nan)
    if rows <= k:
        return found
    for start in range(0, rows, block):
        near = vectors[start : start + block] @ vectors.T
        near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
        closest = -np.partition(-near, k - 1, axis=1)[:, k - 1]
        found[start : start + block] = np.sqrt(np.maximum(2 - 2 * closest, 0))
    return found
