"""Entropic optimal transport between two clouds of points, in the log domain and in blocks: no matrix of all costs.

Sinkhorn's iteration (Cuturi, arXiv 1306.0895) with the regularisation lowered step by step (Schmitzer, arXiv
1610.06519). Cost: the squared Euclidean distance. One pass over the pairs updates both potentials: a block's row
potentials follow from the column potentials alone, and its share of the column marginals from both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..duplicates.shingles import in_threads
from .kmeans import one_blas_thread

Vectors = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]
BLOCK = 512  # rows of a block: beside 1,000 targets 2 MB, which stay in the cache
KEEP = 2**28  # pairs (1 GB of float32) up to which the costs are kept between passes instead of computed again
LEAST = 1e-30  # of a column's mass: below it float32 has no more to say, and the potential moves by 69 epsilon


@dataclass(frozen=True)
class Transport:
    """rows, columns: the potentials f and g, with f_i + g_j <= c_ij softened by epsilon. error: sum of |column mass -
    wanted mass| at the end (rows are exact). passes: over all pairs. epsilon: the regularisation, in units of cost."""

    rows: Reals
    columns: Reals
    error: float
    passes: int
    epsilon: float


def transport(
    points: Vectors,
    targets: Vectors,
    mass: Reals | None = None,
    target_mass: Reals | None = None,
    epsilon: float = 0.05,
    start: Reals | None = None,
    tolerance: float = 1e-3,
    most: int = 500,
    step: Callable[[int, int], None] | None = None,
) -> Transport:
    """The potentials of the entropic optimal transport from `points` (n, d) to `targets` (m, d).

    mass, target_mass: weights, each summing to 1 (default: equal). epsilon: the regularisation as a share of the mean
    cost. start: column potentials to begin with, such as those of a like problem. tolerance: on the column masses; the
    iteration ends there or after `most` passes. Equal input gives equal bytes on any number of threads. Memory: 4 n m
    bytes up to KEEP pairs, beyond that blocks alone.
    """
    n, m = len(points), len(targets)
    mass = np.full(n, 1 / n) if mass is None else mass
    target_mass = np.full(m, 1 / m) if target_mass is None else target_mass
    left, right = (np.einsum("ij,ij->i", each, each, dtype=np.float64) for each in (points, targets))
    mean = float(mass @ left + target_mass @ right - 2 * (mass @ points) @ (target_mass @ targets))
    final = max(epsilon * mean, 1e-6)
    costs = _Costs(points, targets, left.astype(np.float32), right.astype(np.float32), n * m <= KEEP)
    columns = np.zeros(m) if start is None else start.copy()
    now = final if start is not None else max(final, mean)
    passes, error = 0, np.inf
    while passes < most:
        rows, reached = _pass(costs, columns, mass, target_mass, now)
        passes += 1
        error = float(np.abs(reached - target_mass).sum())
        if step is not None:
            step(passes, most)
        if now == final and error <= tolerance:
            break
        columns = columns + now * (np.log(target_mass) - np.log(np.maximum(reached, LEAST)))
        if now > final and error <= 0.1:
            now = max(final, now / 2)
    return Transport(rows, columns, error, passes, final)


@dataclass
class _Costs:
    """Squared distances, block by block; kept after the first pass where there is room."""

    points: Vectors
    targets: Vectors
    left: Vectors
    right: Vectors
    keep: bool

    def __post_init__(self) -> None:
        self.kept: dict[int, Vectors] = {}

    def block(self, low: int) -> Vectors:
        if low in self.kept:
            return self.kept[low]
        part = slice(low, low + BLOCK)
        found = self.points[part] @ self.targets.T
        found *= np.float32(-2)
        found += self.left[part, None]
        found += self.right
        np.maximum(found, 0, out=found)
        if self.keep:
            self.kept[low] = found
        return found


def _pass(costs: _Costs, columns: Reals, mass: Reals, target_mass: Reals, epsilon: float) -> tuple[Reals, Reals]:
    """(row potentials, column masses that follow from them and `columns`)."""
    n = len(costs.points)
    rows = np.empty(n)
    shift = (columns / epsilon + np.log(target_mass)).astype(np.float32)

    def block(low: int) -> Reals:
        scaled = costs.block(low) * np.float32(-1 / epsilon)
        scaled += shift
        top = scaled.max(axis=1)
        scaled -= top[:, None]
        np.exp(scaled, out=scaled)
        total = scaled.sum(axis=1, dtype=np.float64)
        part = slice(low, low + BLOCK)
        rows[part] = -epsilon * (top + np.log(total))
        found: Reals = ((mass[part] / total).astype(np.float32) @ scaled).astype(np.float64)
        return found

    with one_blas_thread():  # sums in the order of blocks
        shares = in_threads(block, range(0, n, BLOCK))
    return rows, np.sum(shares, axis=0)


def gradient(potentials: Reals) -> Reals:
    """How the transport cost changes as mass moves to a point from all others: f_i - mean of the other f (the
    calibrated gradient of LAVA, arXiv 2305.00054). Adding a constant to the potentials changes nothing."""
    n = len(potentials)
    if n < 2:
        return np.zeros(n)
    found: Reals = potentials - (potentials.sum() - potentials) / (n - 1)
    return found
