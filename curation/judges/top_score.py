"""The best rows by one value; by length it is the field's second baseline."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from ..measures.length import Length
from ..selecting.selection import (
    Budgeted,
    Unit,
    all_kept,
    check_budget,
    cost_of,
    descending,
    hashes,
    only_column,
    paid,
    pool,
    ranks,
    reads,
    selected,
    spend,
    value_name,
)
from ..steps import Corpus, Measure


@dataclass(frozen=True)
class TopScore(Budgeted):
    """Keeps the `budget` rows with the highest (prefer = "low": lowest) value in `column` of the measure `of`; by
    default the longest responses, a baseline that many selections lose to (Long Is More for Alignment, arXiv
    2402.04833).

    of: default Length, whose column is then response_words unless `column` names another. column: may be left out
    where the measure has one. unit: what the budget counts: rows, words (of the
    response) or tokens (by the measure `tokens`); words and tokens are never passed: a row that no longer fits is
    passed over for the next that does. Equal values rank by a hash of (seed, row_id). Reasons: not_selected;
    not_scorable where value or cost is null or no finite number. Score: the value. Evidence: {rank, quota} and the
    row's cost where that is not a row. Holds some 60 bytes a row.
    """

    budget: int
    of: Measure | None = None
    column: str | None = None
    prefer: Literal["high", "low"] = "high"
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        self.needs  # noqa: B018 - a HouseError where the columns do not go together

    @property
    def read(self) -> tuple[Measure, str]:
        """The measure and the column that rank rows."""
        if self.of is None:
            return Length(), self.column or "response_words"
        return self.of, only_column(self, self.of, self.column)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return reads(self, self.read, *cost_of(self, self.unit, self.tokens))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, self.unit, self.tokens, value_name(self.needs, *self.read), self.needs)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        scores = rows.scores if self.prefer == "high" else -rows.scores
        order = descending(scores, hashes(rows.keys, self.seed), rows.open)
        proof = {"rank": ranks(order, np.zeros(len(rows), np.int64)), "quota": np.full(len(rows), self.budget)}
        keep = spend(order, rows.costs, self.budget)
        return selected(rows, keep, proof | paid(self.unit, rows.costs))
