"""Score first, then distance: DEITA's selection."""

from dataclasses import dataclass, replace

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
    descending,
    hashes,
    numbers,
    only_column,
    paid,
    picked,
    pool,
    reads,
    row_ids,
    selected,
    spend,
    value_name,
)
from ..steps import Corpus, Measure
from ..text.view import View


@dataclass(frozen=True)
class Deita(Budgeted):
    """Keeps `budget` rows, best score first, each unlike all that were kept before it (DEITA, arXiv 2312.15685).

    The score is `column` of the measure `of`, times `times_column` of the measure `times` where that is given
    (complexity times quality, in the paper). Down the scores a row is taken where its cosine with every row taken so
    far is below `threshold` (0.9: the authors' code; nearness to rows that were not taken does not matter). Where
    that leaves budget over, the rest is filled by score: `round` 2 in the evidence. Vectors are those of the rows'
    `view`: of the recipe's embedding model `embedding`, or, without one, TF-IDF/SVD of `dims` dimensions. Equal scores
    go by a hash of (seed, row_id). unit: what the budget counts: rows, words (of the response) or tokens (by the
    measure `tokens`); words and tokens are never passed: a row that no longer fits is passed over.

    Reasons: not_selected; not_scorable where score or cost is null or no finite number. Score: the score. Evidence: the
    quota, a kept row's rank and round, and of every row that was compared its greatest cosine with a row taken before
    it (similarity) and that row's id (closest). Memory: twice the vectors of all rows (4 · dims bytes each).
    """

    budget: int
    of: Measure
    column: str
    times: Measure | None = None
    times_column: str | None = None
    threshold: float = 0.9
    embedding: str | None = None
    view: View = "pair"
    dims: int = 64
    seed: int = 0
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        reads(self, *self.read, *cost_of(self, self.unit, self.tokens))
        if not 0 < self.threshold <= 1:
            raise HouseError(f"{self}: threshold is a cosine, above 0 and at most 1")

    @property
    def read(self) -> tuple[tuple[Measure, str], ...]:
        """The measures and columns whose product ranks rows."""
        first = (self.of, only_column(self, self.of, self.column))
        times = self.times or (self.of if self.times_column else None)
        return (first,) if times is None else (first, (times, only_column(self, times, self.times_column)))

    @property
    def needs(self) -> tuple[Measure, ...]:
        values = reads(self, *self.read, *cost_of(self, self.unit, self.tokens))
        return tuple(dict.fromkeys((*values, *embedding_needs(self.embedding, self.view))))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.coresets import diverse

        first, *others = (value_name(self.needs, *read) for read in self.read)
        rows = pool(corpus, self.unit, self.tokens, first, self.needs)
        for column in others:
            scores = rows.scores * numbers(corpus, column)
            rows = replace(rows, scores=scores, open=rows.open & np.isfinite(scores))
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        order = descending(rows.scores, hashes(rows.keys, self.seed), rows.open)
        costs = rows.costs[order]
        found = vectors(corpus, self.embedding, self.view, self.dims)[order]
        picks = diverse(found, costs, self.budget, self.threshold)
        rest = np.setdiff1d(np.arange(len(order)), picks.chosen)
        rest = rest[spend(np.arange(len(rest)), costs[rest], self.budget - int(costs[picks.chosen].sum()))]
        turn = np.zeros(len(rows), np.int64)
        turn[order[picks.chosen]], turn[order[rest]] = 1, 2
        proof = {"quota": np.full(len(rows), self.budget), "round": pa.array(turn, mask=turn == 0)}
        chosen = np.concatenate([picks.chosen, rest])
        judged = picked(
            rows,
            row_ids(corpus),
            order,
            chosen,
            ("similarity", picks.value, picks.other),
            proof | paid(self.unit, rows.costs),
        )
        score = selected(rows, rows.open, {})["score"]
        return judged.set_column(2, judged.schema.field("score"), score)
