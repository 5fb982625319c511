"""Selection by clusters of concepts: simple ones give few rows, complex ones many."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..embeddings import embedding_needs, vectors
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
    spend_in_groups,
)
from ..steps import Corpus, Measure
from ..text.view import View


@dataclass(frozen=True)
class DensityBasedPruning(Budgeted):
    """Keeps exactly `budget` rows, more of clusters that are wide and apart, and in each the least typical ones
    (density-based pruning, DBP, arXiv 2401.04578).

    Rows are clustered by k-means (`k` clusters) on `embedding` (an embedding model of the recipe; None: TF-IDF/SVD of
    `dims` dimensions). A cluster's complexity is its mean distance of rows to the centre (intra) times the mean
    distance of its centre to the `neighbours` nearest other centres (inter); its share of the budget is the softmax of
    complexity / `temperature`, never more than it has: what a cluster cannot give goes to the others, which is the
    paper's quadratic program (shares next to the softmax under these bounds) solved by one scale. Inside a cluster the
    rows farthest from the centre come first. Run SemanticDuplicate before it, as the paper does.

    Distances are cosine distances. Reason not_selected. Score: distance to the centre. Evidence {cluster, complexity,
    quota, rank}.
    """

    budget: int
    k: int = 128
    embedding: str | None = None
    view: View = "prompt"
    temperature: float = 0.1
    neighbours: int = 20
    dims: int = 64
    unit: Unit = "rows"
    tokens: Measure | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.unit, self.tokens)
        if min(self.k, self.neighbours, self.dims) < 1 or not self.temperature > 0:
            raise HouseError(f"{self}: k, neighbours and dims are at least 1, temperature is above 0")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (*embedding_needs(self.embedding, self.view), *reads(self, *cost_of(self, self.unit, self.tokens)))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        from ..selecting.kmeans import kmeans

        rows = pool(corpus, self.unit, self.tokens)
        whole = all_kept(self, rows, self.budget, self.unit)
        if whole is not None:
            return whole
        points = vectors(corpus, self.embedding, self.view, self.dims, self.seed)
        order = canonical(rows.keys)
        found = kmeans(points[order], self.k, self.seed)
        labels = np.empty(len(rows), np.int64)
        labels[order] = found.labels
        centres = found.centres / np.maximum(np.linalg.norm(found.centres, axis=1, keepdims=True), 1e-6)
        distance = 1.0 - np.einsum("ij,ij->i", points, centres[labels]).astype(np.float64)
        complexity = complexities(distance, labels, centres, self.neighbours)
        weights = np.exp((complexity - complexity.max()) / self.temperature)
        first = descending(distance, hashes(rows.keys, self.seed), rows.open)
        keep, rank, quota = spend_in_groups(first, labels, rows.costs, weights, self.budget)
        proof = {
            "cluster": labels,
            "complexity": complexity[labels],
            "quota": quota[labels],
            "rank": rank,
            **paid(self.unit, rows.costs),
        }
        return selected(replace(rows, scores=distance), keep, proof)


def complexities(distance: np.ndarray, labels: np.ndarray, centres: np.ndarray, neighbours: int) -> np.ndarray:
    """Of each cluster: mean `distance` of its rows times the mean cosine distance of its centre to the nearest
    `neighbours` others (1 for a lone cluster)."""
    k = len(centres)
    intra = np.bincount(labels, weights=distance, minlength=k) / np.maximum(np.bincount(labels, minlength=k), 1)
    if k == 1:
        return np.asarray(intra, np.float64)
    between = 1.0 - (centres @ centres.T).astype(np.float64)
    np.fill_diagonal(between, np.inf)
    near = np.sort(between, axis=1)[:, : min(neighbours, k - 1)]
    return np.asarray(intra * near.mean(axis=1), np.float64)
