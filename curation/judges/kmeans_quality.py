"""Selection by clusters and quality: an exact budget, spread over what the instructions are about."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..embeddings import embedding_needs, vectors
from ..folder import HouseError
from ..measures.length import Length
from ..measures.perplexity import ResponsePerplexity
from ..selecting.selection import (
    Bools,
    Budgeted,
    Pool,
    Reals,
    Shares,
    Unit,
    all_kept,
    canonical,
    cost_of,
    descending,
    gumbel,
    hashes,
    only_column,
    paid,
    pool,
    reads,
    selected,
    shared,
    spend_in_groups,
    value_name,
)
from ..steps import Corpus, Measure
from ..text.view import View

if TYPE_CHECKING:
    from ..text.spans import Ints

CLUSTERED = "clusters.parquet"
_LONG_TAILED = ("words", "chars", "turns", "tokens", "nll", "perplexity", "loss")  # endings of value columns


@dataclass(frozen=True)
class KMeansQuality(Budgeted):
    """Keeps exactly `budget` rows by k-means-quality sampling (kMQ, Diversify and Conquer, arXiv 2409.11378).

    Rows are clustered by k-means (`k` clusters) on vectors of their `view`: those of the recipe's embedding model
    `embedding`, or, without one, TF-IDF/SVD of `dims` dimensions. Each cluster's quota is proportional to its size
    (shares = "proportional", the article), equal ("equal", the authors' code) or proportional to the size's square
    root ("sqrt"), at least 1 where the budget allows; what a cluster cannot fill goes to the others. Inside a cluster
    rows are drawn without replacement with probability softmax(quality / `temperature`).

    unit: what the budget counts: rows, words (of the response) or tokens (by the measure `tokens`). Budgets in words
    and tokens are never passed: rows come in the order of how full they make their cluster's quota, and one that no
    longer fits is passed over.

    quality: the value column that ranks a row, of Length (such as response_words, in whole words), of
    ResponsePerplexity(`model`), or of any measure `of` (then named by `column`, or its only one). Counts, losses and
    perplexities are put on a log scale; all are standardised over all rows, and turned round for prefer = "low". Equal
    values draw uniformly; a temperature towards 0 takes the best, a high one draws at random.

    Reasons: not_selected; not_scorable where quality or cost is null or no finite number. Evidence of every scored row:
    {cluster, quota, rank} and its cost where that is not a row; with a budget in rows, kept where rank <= quota. A
    budget that is not below the rows keeps them all, with a warning and a note as evidence. Rows are drawn by a hash
    of (seed, row_id): neither their order nor the size of parts matters; the clusters do not depend on `seed`.
    Clusters and qualities are kept, so that another budget, unit of shares, temperature or seed costs milliseconds.
    Memory: twice the vectors of all rows (4 · dims bytes each); texts too, without a model.
    """

    budget: int
    k: int = 128
    quality: str = "response_words"
    prefer: Literal["high", "low"] = "high"
    model: str | None = None
    dims: int = 64
    view: View = "prompt"
    temperature: float = 1.0
    seed: int = 0
    embedding: str | None = None
    of: Measure | None = None
    column: str | None = None
    shares: Shares = "proportional"
    unit: Unit = "rows"
    tokens: Measure | None = None

    def __post_init__(self) -> None:
        if self.budget < 1 or self.k < 1 or self.dims < 1 or not self.temperature > 0:
            raise HouseError(f"{self}: budget, k and dims are at least 1, temperature is above 0")
        reads(self, self.read, *cost_of(self, self.unit, self.tokens))

    @property
    def read(self) -> tuple[Measure, str]:
        """The measure and the column that rank rows."""
        if self.of is not None:
            return self.of, only_column(self, self.of, self.column)
        if self.quality in Length.columns:
            return Length(), self.quality
        if self.quality not in ResponsePerplexity.columns:
            known = ", ".join([*Length.columns, *ResponsePerplexity.columns])
            raise HouseError(f"{self}: no value column is called {self.quality!r}; there are {known}, or give `of`")
        if self.model is None:
            raise HouseError(f"{self}: {self.quality} needs a model; add model: NAME")
        return ResponsePerplexity(self.model), self.quality

    @property
    def needs(self) -> tuple[Measure, ...]:
        read = reads(self, self.read, *cost_of(self, self.unit, self.tokens))
        return tuple(dict.fromkeys((*read, *embedding_needs(self.embedding, self.view))))

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        rows = pool(corpus, self.unit, self.tokens, value_name(self.needs, *self.read), self.needs)
        everything = all_kept(self, rows, self.budget, self.unit)
        if everything is not None:
            return everything
        labels = clusters(vectors(corpus, self.embedding, self.view, self.dims), rows, self.k)
        keep_clusters(corpus.kept / CLUSTERED, rows, labels, self._settings())
        return self._decide(rows, labels)

    def rejudge(self, corpus: Corpus, kept: Path, came: npt.NDArray[np.bool_]) -> pa.Table | None:
        """Verdicts from what another decision over the same rows left under `kept`; None where rows went missing, or
        where that one clustered or measured otherwise."""
        found = kept_clusters(kept / CLUSTERED, self._settings()) if came.all() else None
        if found is None or len(found[0]) != len(came):
            return None
        everything = all_kept(self, found[0], self.budget, self.unit)
        return self._decide(*found) if everything is None else everything

    def logits(self, rows: Pool) -> Reals:
        """Log-weights with which rows are drawn; NaN where a row has no finite quality."""
        return standardised(rows.scores, self.read[1], self.prefer) / self.temperature

    def _settings(self) -> str:
        what = (self.k, self.embedding, self.view, None if self.embedding else self.dims)
        return repr((what, self.read, self.unit, self.tokens))

    def _decide(self, rows: Pool, labels: "Ints") -> pa.Table:
        keys = self.logits(rows) + gumbel(rows.keys, self.seed)
        order = descending(keys, hashes(rows.keys, self.seed), rows.open)
        weights = shared(np.bincount(labels, weights=rows.costs), self.shares)
        keep, rank, quota = spend_in_groups(order, labels, rows.costs, weights, self.budget)
        proof = {"cluster": labels, "quota": quota[labels], "rank": rank}
        return selected(rows, keep, proof | paid(self.unit, rows.costs))


def standardised(values: Reals, name: str, prefer: Literal["high", "low"]) -> Reals:
    """z-scores of a value column, NaN where it holds no finite number; zeros where all values are equal.

    Counts, losses and perplexities have long right tails (an answer of 2,000 words is 9 deviations out, and a softmax
    would take nothing else), so they are compared by log(1 + x)."""
    values = np.where(np.isfinite(values), values, np.nan)
    if name.endswith(_LONG_TAILED) and not (values < 0).any():
        values = np.log1p(values)
    known = np.sort(values[~np.isnan(values)])  # sums in an order of their own: equal bytes for any order of the rows
    spread = known.std() if len(known) else 0.0
    # below rounding, equal values must not be told apart
    score = (values - known.mean()) / spread if spread > 1e-9 else np.where(np.isnan(values), np.nan, 0.0)
    return score if prefer == "high" else -score


def clusters(found: npt.NDArray[np.float32], rows: Pool, k: int) -> "Ints":
    """Cluster of each row, numbered without gaps in the order of row_id. At most `k`."""
    from ..selecting.kmeans import kmeans

    order = canonical(rows.keys)
    labels = np.empty(len(order), np.int64)
    labels[order] = kmeans(found[order], k).labels
    return labels


def keep_clusters(path: Path, rows: Pool, labels: "Ints", settings: str) -> None:
    """Writes what another decision over the same rows needs."""
    columns = {"high": rows.keys[:, 0], "low": rows.keys[:, 1], "score": rows.scores, "cost": rows.costs}
    found = pa.table({**columns, "open": rows.open, "cluster": labels.astype(np.int32)})
    pq.write_table(found.replace_schema_metadata({"settings": settings}), path, compression="zstd")


def kept_clusters(path: Path, settings: str) -> "tuple[Pool, Ints] | None":
    """What `keep_clusters` wrote, where it was written under equal settings."""
    if not path.is_file():
        return None
    found = pq.read_table(path)
    if (found.schema.metadata or {}).get(b"settings") != settings.encode():
        return None
    high, low, score, cost, cluster = (found[n].to_numpy() for n in ("high", "low", "score", "cost", "cluster"))
    open_rows: Bools = found["open"].to_numpy()
    return Pool(np.stack([high, low], axis=1), score, cost, open_rows), cluster.astype(np.int64)
