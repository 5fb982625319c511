"""Selection that leaves no row far from a kept one."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs, vectors
from ..selecting.selection import (
    Budgeted,
    Unit,
    all_kept,
    check_budget,
    cost_of,
    paid,
    picked,
    pool,
    reads,
    row_ids,
    shuffled,
)
from ..steps import Corpus, Measure
from ..text.view import View


@dataclass(frozen=True)
class KCenter(Budgeted):
    """Keeps `budget` rows such that no row is far from a kept one: greedy k-centre, each pick the row that is farthest
    from all picks before it (core-set selection, Sener and Savarese, arXiv 1708.00489; the radius is within twice the
    best possible, Gonzalez 1985). It takes outliers first: clean the rows before.

    Distances are Euclidean, between unit vectors of the rows' `view`: of the recipe's embedding model `embedding`, or,
    without one, TF-IDF/SVD of `dims` dimensions. The first row is drawn by `seed`; ties go by a hash of (seed,
    row_id). unit: what the budget counts: rows, words (of the response) or tokens (by the measure `tokens`); words and
    tokens are never passed: a row that no longer fits is passed over.

    Reasons: not_selected; not_scorable where the cost is unknown. Score: of a kept row its distance from the
    picks before it, of another row its distance from the closest kept row. Evidence: the quota, a kept row's rank, that
    distance and that row's id (closest). Memory: twice the vectors of all rows (4 · dims bytes each).
    """

    budget: int
    embedding: str | None = None
    view: View = "prompt"
    dims: int = 64
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)

    @property
    def needs(self) -> tuple[Measure, ...]:
        costs = reads(self, *cost_of(self, self.unit, self.tokens))
        return tuple(dict.fromkeys((*costs, *embedding_needs(self.embedding, self.view))))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.coresets import farthest_first

        rows = pool(corpus, self.unit, self.tokens)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        order = shuffled(rows.keys, self.seed, rows.open)
        found = vectors(corpus, self.embedding, self.view, self.dims)[order]
        picks = farthest_first(found, rows.costs[order], self.budget)
        distance, other = picks.value.copy(), picks.other.copy()
        distance[picks.chosen] = picks.gain
        other[picks.chosen[np.isinf(picks.gain)]] = -1  # the first had none before it
        proof = {"quota": np.full(len(rows), self.budget)} | paid(self.unit, rows.costs)
        return picked(rows, row_ids(corpus), order, picks.chosen, ("distance", distance, other), proof)
