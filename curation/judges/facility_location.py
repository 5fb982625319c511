"""Selection of the rows that stand best for all rows."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs, vectors
from ..folder import HouseError
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
class FacilityLocation(Budgeted):
    """Keeps `budget` rows so that every row has a similar one among them: greedy maximisation of the sum over all rows
    of the cosine with the most similar kept row (facility location, a submodular function; Wei, Iyer and Bilmes 2015;
    for instruction data arXiv 2401.06692). Unlike KCenter it cares for the bulk, not for outliers.

    Of each row only the `neighbours` most similar rows count, at least 0 each. Up to 8,192 rows they are exact; beyond,
    they are sought among some 6,000 rows of the 12 nearest k-means cells. The greedy choice reaches at least 1 - 1/e
    of the best possible value of that sum (Nemhauser, Wolsey and Fisher 1978), a sum that differs from the full one by
    at most the greatest cosine left out, row by row. Vectors are those of the rows' `view`: of the recipe's embedding
    model `embedding`, or, without one, TF-IDF/SVD of `dims` dimensions. Ties go by a hash of (seed, row_id). unit: what
    the budget counts: rows, words (of the response) or tokens (by the measure `tokens`); words and tokens are never
    passed: a row that no longer fits is passed over (and the bound is that of rows).

    Reasons: not_selected; not_scorable where the cost is unknown. Score: of every row its cosine with the most
    similar kept row among its neighbours (none where none is kept). Evidence: the quota, a kept row's rank, that cosine
    (similarity) and that row's id (closest). Memory: twice the vectors of all rows, and 24 · neighbours bytes a row.
    """

    budget: int
    embedding: str | None = None
    view: View = "prompt"
    dims: int = 64
    neighbours: int = 64
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if self.neighbours < 1:
            raise HouseError(f"{self}: neighbours is at least 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        costs = reads(self, *cost_of(self, self.unit, self.tokens))
        return tuple(dict.fromkeys((*costs, *embedding_needs(self.embedding, self.view))))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.coresets import facility_location

        rows = pool(corpus, self.unit, self.tokens)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        order = shuffled(rows.keys, self.seed, rows.open)
        found = vectors(corpus, self.embedding, self.view, self.dims)[order]
        picks = facility_location(found, rows.costs[order], self.budget, self.neighbours)
        proof = {"quota": np.full(len(rows), self.budget)} | paid(self.unit, rows.costs)
        return picked(rows, row_ids(corpus), order, picks.chosen, ("similarity", picks.value, picks.other), proof)
