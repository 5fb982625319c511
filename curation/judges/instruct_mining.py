"""A selection by predicted loss: InstructMining."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs, vectors
from ..folder import HouseError
from ..measures.indicators import Indicators
from ..selecting.selection import canonical, descending, hashes, numbers, pool, ranks, reads, selected, spend
from ..steps import Corpus, Measure

_KNN = re.compile(r"knn_([1-9]\d*)")


@dataclass(frozen=True)
class InstructMining:
    """Keeps the `budget` rows with the lowest predicted log loss, a linear rule over indicators of each row (Cao et
    al., arXiv 2307.06290).

    rule: pairs [column, weight], added to `intercept`; fit them on your own runs with curation.loss_rule.fit_rule. The
    default is the rule of the paper's first version without its reward term, for which a reward model is needed: with
    the measure of one in `of`, add [COLUMN, -0.1498]. Columns: input_length, output_length and mtld (Indicators),
    knn_K (the distance to the K-th nearest row's prompt by the embedding model `embedding`, or by TF-IDF where it is
    None), and all number columns of the measures in `of` (perplexity, judge scores).

    Equal predictions rank by a hash of (seed, row_id). Reasons: not_selected; not_scorable where an indicator is null.
    Score: the predicted log loss, which means nothing but its order unless the rule was fitted on runs like yours.
    Evidence {rank, quota}. Finding neighbours takes time quadratic in the rows: 10,000 rows some seconds.
    """

    budget: int
    rule: tuple[tuple[str, float], ...] = (("output_length", 8.257e-5), ("knn_6", -0.9350))
    intercept: float = 1.0694
    of: tuple[Measure, ...] = ()
    embedding: str | None = None
    seed: int = 0

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.budget < 1 or not self.rule:
            raise HouseError(f"{self}: budget is at least 1, and the rule has at least one term")
        if len({name for name, _ in self.rule}) < len(self.rule):
            raise HouseError(f"{self}: the rule names a column twice")
        self.needs  # noqa: B018 - a HouseError where a column is in no measure

    @property
    def needs(self) -> tuple[Measure, ...]:
        wanted = []
        for name, _ in self.rule:
            if _KNN.fullmatch(name):
                continue
            holders = [measure for measure in (Indicators(), *self.of) if name in measure.columns]
            if not holders:
                known = [column for measure in (Indicators(), *self.of) for column in measure.columns]
                raise HouseError(f"{self}: no column {name!r}; there are {', '.join(known)} and knn_6")
            wanted.append((holders[0], name))
        near = any(_KNN.fullmatch(name) for name, _ in self.rule)
        return (*reads(self, *wanted), *(embedding_needs(self.embedding, "prompt") if near else ()))

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # the cut follows from the corpus and the budget

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, "rows", None)
        predicted = np.full(len(rows), self.intercept)
        for name, weight in self.rule:
            predicted += weight * self._indicator(corpus, name, canonical(rows.keys))
        rows.scores[:] = np.where(np.isfinite(predicted), predicted, np.nan)
        rows.open[:] = np.isfinite(predicted)
        order = descending(-rows.scores, hashes(rows.keys, self.seed), rows.open)
        keep = spend(order, rows.costs, self.budget)
        places = ranks(order, np.zeros(len(rows), np.int64))
        return selected(rows, keep, {"rank": places, "quota": np.full(len(rows), self.budget)})

    def _indicator(self, corpus: Corpus, name: str, order: np.ndarray) -> np.ndarray:
        """A column as float64, null as NaN. Neighbours are looked for in the order of row_id."""
        near = _KNN.fullmatch(name)
        if near is None:
            return numbers(corpus, name)
        from ..selecting.loss_rule import neighbour_distance

        found = np.empty(len(order))
        found[order] = neighbour_distance(
            vectors(corpus, self.embedding, "prompt", seed=self.seed)[order], int(near[1])
        )
        return found
