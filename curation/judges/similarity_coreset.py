"""Selection by nearness to a target set that k-means has made small."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs
from ..folder import HouseError
from ..selecting.selection import (
    Budgeted,
    Unit,
    all_kept,
    check_budget,
    cost_of,
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
class SimCore(Budgeted):
    """Keeps the rows of an open pool that lie nearest to a target set, a round of nearest ones at a time (SimCore,
    arXiv 2303.11101).

    targets: files or folders of rows like those that the tuned model will meet; k-means makes `k` centres of them. In
    each round every centre takes its nearest row that is still free; rounds go on until the budget is met or, with
    `ratio`, until a round's mean similarity falls below `ratio` times that of the first (the paper's stop, 0.95), for
    then the pool has no more of the kind: fewer rows than the budget are kept, with a warning. embedding: an embedding
    model of the recipe (None: TF-IDF/SVD of `dims` dimensions, fitted on pool and targets). unit, tokens: as in
    RandomSample.

    Reason not_selected. Score: cosine similarity with the nearest centre. Evidence {centre, similarity, round, rank}
    for kept rows, {centre, similarity} for the others. Memory: 12 k bytes a row.
    """

    budget: int
    targets: tuple[str, ...]
    k: int = 100
    ratio: float | None = None
    embedding: str | None = None
    view: View = "prompt"
    dims: int = 64
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if self.k < 1 or self.dims < 1 or not (self.ratio is None or 0 < self.ratio <= 1):
            raise HouseError(f"{self}: k and dims are at least 1, ratio lies in (0, 1] or is left out")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (*embedding_needs(self.embedding, self.view), *reads(self, *cost_of(self, self.unit, self.tokens)))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.kmeans import kmeans
        from ..selecting.targets import pool_and_targets, target_texts

        rows = pool(corpus, self.unit, self.tokens)
        said = target_texts(self.targets, self.view)
        whole = all_kept(self, rows, self.budget, self.unit)
        if whole is not None and self.ratio is None:
            return whole
        points, targets = pool_and_targets(corpus, said, self.embedding, self.view, self.dims, self.seed)
        centres = kmeans(targets, self.k, self.seed).centres
        centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
        taken, near = rounds_of_nearest(points, centres, hashes(rows.keys, self.seed), rows.open)
        order = np.lexsort((-near.best, taken))
        order = order[rows.open[order]]
        if self.ratio is not None:
            means = np.bincount(taken[order], weights=near.best[order]) / np.maximum(np.bincount(taken[order]), 1)
            below = np.flatnonzero(means[1:] < self.ratio * means[1]) + 1 if len(means) > 1 else np.zeros(0, np.int64)
            order = order[taken[order] < (below[0] if len(below) else len(means))]
        keep = spend(order, rows.costs, self.budget)
        if self.ratio is not None and rows.costs[keep].sum() < self.budget:
            warnings.warn(
                f"SimCore: {int(keep.sum())} rows are near the targets; the budget was {self.budget} {self.unit}",
                stacklevel=2,
            )
        rank = np.zeros(len(rows), np.int64)
        rank[order] = 1 + np.arange(len(order))
        proof = {
            "centre": near.centre,
            "similarity": near.best,
            "round": pa.array(taken, mask=~keep),
            "rank": pa.array(rank, mask=~keep),
            **paid(self.unit, rows.costs),
        }
        return selected(replace(rows, scores=near.best), keep, proof)


@dataclass(frozen=True)
class Nearest:
    """Of each row the centre that took it (or its nearest one) and the similarity with that."""

    centre: np.ndarray
    best: np.ndarray


def rounds_of_nearest(
    points: np.ndarray, centres: np.ndarray, ties: np.ndarray, open_rows: np.ndarray
) -> tuple[np.ndarray, Nearest]:
    """The round, from 1, in which each open row is taken: in a round every centre, in order, takes its nearest free
    row. Equal similarities go by `ties`. Work: each centre's list of rows is sorted once."""
    from ..selecting.kmeans import in_blocks

    free = np.flatnonzero(open_rows)
    similarity = np.empty((len(centres), len(points)), np.float32)

    def block(part: slice) -> None:
        similarity[:, part] = centres @ points[part].T

    in_blocks(block, len(points))
    centre = similarity.argmax(axis=0)
    best = similarity.max(axis=0).astype(np.float64)
    lists = [free[np.lexsort((ties[free], -similarity[c, free]))] for c in range(len(centres))]
    at, taken = np.zeros(len(centres), np.int64), np.zeros(len(points), np.int64)
    left, number = len(free), 0
    while left:
        number += 1
        for c, order in enumerate(lists):
            while at[c] < len(order) and taken[order[at[c]]]:
                at[c] += 1
            if at[c] < len(order):
                row = order[at[c]]
                taken[row], centre[row], best[row] = number, c, similarity[c, row]
                left -= 1
    return taken, Nearest(centre, best)
