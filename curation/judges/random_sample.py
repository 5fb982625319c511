"""The baseline of every selection: rows drawn at random."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..selecting.selection import (
    Budgeted,
    Unit,
    all_kept,
    check_budget,
    cost_of,
    paid,
    pool,
    ranks,
    reads,
    selected,
    shuffled,
    spend,
)
from ..steps import Corpus, Measure


@dataclass(frozen=True)
class RandomSample(Budgeted):
    """Keeps `budget` rows drawn at random, all alike: the baseline that a selection has to beat at equal tokens (RS2,
    arXiv 2305.18424, shows how hard that is).

    unit: what the budget counts: rows, words (of the response) or tokens (by the measure `tokens`); words and tokens
    are never passed: a row that no longer fits is passed over for the next that does. Rows rank by a hash of (seed,
    row_id): a larger budget keeps what a smaller one kept. Reasons: not_selected; not_scorable where the cost is
    unknown. Evidence: {rank, quota} and the row's cost where that is not a row. Holds some 60 bytes a row.
    """

    budget: int
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return reads(self, *cost_of(self, self.unit, self.tokens))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, self.unit, self.tokens)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        order = shuffled(rows.keys, self.seed, rows.open)
        proof = {"rank": ranks(order, np.zeros(len(rows), np.int64)), "quota": np.full(len(rows), self.budget)}
        keep = spend(order, rows.costs, self.budget)
        return selected(rows, keep, proof | paid(self.unit, rows.costs))
