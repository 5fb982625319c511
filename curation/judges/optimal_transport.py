"""Selection towards a target set: the rows that pull the mix to it most."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs
from ..folder import HouseError
from ..selecting.selection import (
    Budgeted,
    Unit,
    all_kept,
    canonical,
    check_budget,
    cost_of,
    descending,
    hashes,
    paid,
    pool,
    reads,
    selected,
    spend,
)
from ..steps import Corpus, Measure
from ..text.view import View


@dataclass(frozen=True)
class GotD(Budgeted):
    """Keeps exactly `budget` rows that move the mix to a target set: those along which the optimal-transport distance
    falls fastest (GOT-D, arXiv 2405.02774).

    targets: files or folders of rows like those that the tuned model will meet. One entropic transport problem from the
    pool to the targets is solved; a row's calibrated dual potential is the gradient of the distance with respect to
    its mass, and rows of the smallest gradient are taken. rounds: the budget is spent in so many equal steps; before
    each but the first the problem is solved again for a mix of half pool, half what is selected, for one gradient
    serves the neediest topic alone. embedding: an embedding model of the recipe (None: TF-IDF/SVD of `dims`
    dimensions, fitted on pool and targets). epsilon: regularisation as a share of the mean cost; 0.005 to 0.3 select
    much the same. unit, tokens: as in RandomSample.

    Reason not_selected. Score: the gradient of the round in which the row was taken, else of the last. Evidence {rank,
    round, budget}; rank counts the rows in the order of taking, then of the last gradient. Memory: 4 bytes for each
    pair of row and target up to 1 GB, and the vectors.
    """

    budget: int
    targets: tuple[str, ...]
    embedding: str | None = None
    view: View = "prompt"
    rounds: int = 4
    epsilon: float = 0.05
    dims: int = 64
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if self.rounds < 1 or not self.epsilon > 0 or self.dims < 1:
            raise HouseError(f"{self}: rounds and dims are at least 1, epsilon is above 0")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (*embedding_needs(self.embedding, self.view), *reads(self, *cost_of(self, self.unit, self.tokens)))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.targets import pool_and_targets, target_texts
        from ..selecting.transport import gradient, transport

        rows = pool(corpus, self.unit, self.tokens)
        said = target_texts(self.targets, self.view)
        whole = all_kept(self, rows, self.budget, self.unit)
        if whole is not None:
            return whole
        points, targets = pool_and_targets(corpus, said, self.embedding, self.view, self.dims, self.seed)
        ties = hashes(rows.keys, self.seed)
        order = canonical(rows.keys)  # sums in the order of row_id
        keep = np.zeros(len(rows), np.bool_)
        score, taken_in = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        rank, columns, spent = np.zeros(len(rows), np.int64), None, 0
        for number in range(1, self.rounds + 1):
            mass = np.full(len(rows), 1 / len(rows))
            if keep.any():
                mass = mass / 2 + keep / (2 * keep.sum())
            found = transport(points[order], targets, mass[order], None, self.epsilon, columns)
            columns = found.columns
            slope = np.empty(len(rows))
            slope[order] = gradient(found.rows)
            score = np.where(keep, score, slope)
            free = descending(-slope, ties, rows.open & ~keep)
            share = round(self.budget * number / self.rounds) - spent
            now = spend(free, rows.costs, share)
            taken = free[now[free]]
            rank[taken] = keep.sum() + 1 + np.arange(len(taken))
            taken_in[taken] = number
            keep |= now
            spent += int(rows.costs[now].sum())
            corpus.progress(number, self.rounds)
        rest = free[~keep[free]]
        rank[rest] = keep.sum() + 1 + np.arange(len(rest))
        proof = {
            "rank": rank,
            "round": pa.array(taken_in, mask=~keep),
            "budget": np.full(len(rows), self.budget),
            **paid(self.unit, rows.costs),
        }
        return selected(replace(rows, scores=score), keep, proof)
