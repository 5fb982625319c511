"""Selection by the representations that a model has of rows and of target queries."""

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
    hashes,
    paid,
    pool,
    reads,
    selected,
)
from ..steps import Corpus, Measure
from ..text.view import View


@dataclass(frozen=True)
class RepresentationSimilarity(Budgeted):
    """Keeps exactly `budget` rows that lie nearest to target queries, the targets taking turns (RDS+, Large-Scale Data
    Selection for Instruction Tuning, arXiv 2503.01807).

    targets: files or folders of rows like those that the tuned model will meet. Each target in turn takes the row of
    the highest cosine similarity that is still free, until the budget is met: no target is served at the cost of the
    others. embedding: a model of the recipe. RDS+ is the base causal LM that is to be tuned: its last hidden states,
    averaged with weights that grow with the position, of prompt and response (view: pair). An embedding model serves as
    well; None: TF-IDF/SVD of `dims` dimensions, fitted on pool and targets. unit, tokens: as in RandomSample.

    Reason not_selected. Score: cosine similarity with the target that took the row, else with the nearest one. Evidence
    {target (its number, from 0), similarity, budget}, and {rank} of kept rows. Ties go by a hash of (seed, row_id).
    Memory: 4 bytes a dimension and row, and 100 times the budget.
    """

    budget: int
    targets: tuple[str, ...]
    embedding: str | None = None
    view: View = "pair"
    dims: int = 256
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if self.dims < 1:
            raise HouseError(f"{self}: dims is at least 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (*embedding_needs(self.embedding, self.view), *reads(self, *cost_of(self, self.unit, self.tokens)))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.round_robin import round_robin
        from ..selecting.targets import pool_and_targets, target_texts

        rows = pool(corpus, self.unit, self.tokens)
        said = target_texts(self.targets, self.view)
        whole = all_kept(self, rows, self.budget, self.unit)
        if whole is not None:
            return whole
        points, targets = pool_and_targets(corpus, said, self.embedding, self.view, self.dims, self.seed)
        order = canonical(rows.keys)
        ties = hashes(rows.keys, self.seed)[order]
        found = round_robin(points[order], targets, rows.costs[order], self.budget, rows.open[order], ties)
        keep, near = np.zeros(len(rows), np.bool_), np.zeros(len(rows))
        rank, target = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        taken = order[found.rows]
        keep[taken], rank[taken] = True, 1 + np.arange(len(taken))
        target[order], near[order] = found.target, found.similarity
        proof = {
            "rank": pa.array(rank, mask=~keep),
            "target": target,
            "similarity": np.round(near, 6),
            "budget": np.full(len(rows), self.budget),
            **paid(self.unit, rows.costs),
        }
        return selected(replace(rows, scores=near), keep, proof)
