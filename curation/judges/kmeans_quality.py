"""Selection by clusters and quality: an exact budget, spread over what the instructions are about."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..embeddings import tfidf_svd
from ..folder import HouseError
from ..measures.length import Length
from ..measures.perplexity import ResponsePerplexity
from ..rows import digest
from ..steps import Corpus, Measure, verdicts
from ..text import VIEW_COLUMNS, View, view


@dataclass(frozen=True)
class KMeansQuality:
    """Keeps exactly `budget` rows by k-means-quality sampling (kMQ, Diversify and Conquer, arXiv 2409.11378).

    Rows are clustered by k-means (`k` clusters) on TF-IDF/SVD embeddings (`dims` dimensions) of their `view`. Each
    cluster's quota is proportional to its size, at least 1 where the budget allows; what a cluster cannot fill goes to
    the others. Inside a cluster rows are drawn without replacement with probability softmax(quality / `temperature`).

    quality: the value column that ranks a row, of Length (such as response_words, in whole words) or of
    ResponsePerplexity(`model`); it is put on a log scale (but for probabilities), standardised over all rows, and
    turned round for prefer = "low". Equal values draw uniformly; a temperature towards 0 takes the best, a high one
    draws at random. Reasons: not_selected; not_scorable where the quality is null or no finite number. Evidence of
    every scored row: {cluster, quota, rank}, kept where rank <= quota. A budget that is not below the rows keeps them
    all, with a warning and a note as evidence. Rows are drawn by a hash of (seed, row_id): neither their order nor
    the size of parts matters. Memory: texts and embeddings of all rows (4 · dims bytes each).
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

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = None  # the field `quality` says which

    def __post_init__(self) -> None:
        if self.budget < 1 or self.k < 1 or self.dims < 1 or not self.temperature > 0:
            raise HouseError(f"{self}: budget, k and dims are at least 1, temperature is above 0")
        if self.quality not in Length.columns and self.quality not in ResponsePerplexity.columns:
            known = ", ".join([*Length.columns, *ResponsePerplexity.columns])
            raise HouseError(f"{self}: no value column is called {self.quality!r}; there are {known}")
        if self.quality not in Length.columns and self.model is None:
            raise HouseError(f"{self}: {self.quality} needs a model; add model: NAME")

    @property
    def needs(self) -> tuple[Measure, ...]:
        if self.quality in Length.columns or self.model is None:
            return (Length(),)
        return (ResponsePerplexity(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # quotas follow from the corpus and stand in the evidence

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        names: list[str] = []
        texts: list[str] = []
        for table in corpus.tables(["row_id", *VIEW_COLUMNS]):
            names += table["row_id"].to_pylist()
            texts += view(table, self.view)
        values = corpus.values([self.quality])[self.quality].cast(pa.float64()).to_numpy()  # null becomes NaN
        quality = standardised(values, self.quality, self.prefer)
        scored = ~np.isnan(quality)
        reasons: list[str | None] = [None if known else "not_scorable" for known in scored]
        evidence: list[dict[str, Any] | None] = [None] * len(names)
        if self.budget >= scored.sum():
            note = f"budget {self.budget} of {scored.sum()} rows: all kept"
            warnings.warn(f"KMeansQuality: {note}", stacklevel=2)
            evidence = [{"note": note} if known else None for known in scored]
        else:
            order = np.array(sorted(range(len(names)), key=names.__getitem__))
            chosen = self._select([names[i] for i in order], [texts[i] for i in order], quality[order])
            for index, proof in zip(order.tolist(), chosen, strict=True):
                if proof is not None:
                    evidence[index] = proof
                    reasons[index] = None if proof["rank"] <= proof["quota"] else "not_selected"
        return verdicts([reason is None for reason in reasons], reasons, values.tolist(), evidence)

    def _select(self, names: list[str], texts: list[str], quality: np.ndarray) -> list[dict[str, int] | None]:
        """Evidence of each row, None where its quality is NaN. Rows come sorted by row_id."""
        labels = clusters(tfidf_svd(texts, self.dims, self.seed), self.k, self.seed)
        scored = ~np.isnan(quality)
        sizes = np.bincount(labels)
        shares = quotas(sizes, np.bincount(labels[scored], minlength=len(sizes)), self.budget)
        keys = quality / self.temperature + gumbel(names, self.seed)
        evidence: list[dict[str, int] | None] = [None] * len(names)
        ranks = np.zeros(len(sizes), np.int64)
        for index in np.argsort(-keys, kind="stable"):  # NaN comes last
            if scored[index]:
                label = labels[index]
                ranks[label] += 1
                evidence[index] = {"cluster": int(label), "quota": int(shares[label]), "rank": int(ranks[label])}
        return evidence


def standardised(values: np.ndarray, name: str, prefer: Literal["high", "low"]) -> np.ndarray:
    """z-scores of a value column, NaN where it holds no finite number; zeros where all values are equal.

    Counts, losses and perplexities have long right tails (an answer of 2,000 words is 9 deviations out, and a softmax
    would take nothing else), so they are compared by log(1 + x)."""
    values = np.where(np.isfinite(values), values, np.nan)
    if not name.endswith("_prob"):
        values = np.log1p(values)
    known = values[~np.isnan(values)]
    spread = known.std() if len(known) else 0.0
    # below rounding, equal values must not be told apart
    score = (values - known.mean()) / spread if spread > 1e-9 else np.where(np.isnan(values), np.nan, 0.0)
    return score if prefer == "high" else -score


def clusters(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Cluster of each row, int64, numbered 0, 1, … without gaps in the order of their first row. At most `k`."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    k = min(k, len(np.unique(vectors, axis=0)))
    with threadpool_limits(1), warnings.catch_warnings():  # sums over threads would depend on their number
        warnings.simplefilter("ignore")
        # up to 2**20 distances an iteration Lloyd's takes well under a second
        if len(vectors) * k <= 2**20:
            model = KMeans(k, n_init=3, random_state=seed)
        else:
            model = MiniBatchKMeans(k, n_init=3, batch_size=4096, random_state=seed)
        labels = model.fit_predict(vectors)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def quotas(sizes: np.ndarray, available: np.ndarray, budget: int) -> np.ndarray:
    """Rows to take of each cluster, int64: proportional to `sizes`, at most `available`, at least 1 where anything is
    available and the budget suffices, `budget` in all (or all that is available).

    The shares are clip(scale · size, least, available) with the one scale that spends the budget; what rounding down
    leaves goes to the largest remainders, ties to the larger, then to the earlier cluster."""
    budget = min(budget, int(available.sum()))
    least = np.minimum(available, 1) if budget >= np.count_nonzero(available) else np.zeros_like(available)
    low, high = 0.0, float(available.sum()) + 1.0  # scale · size reaches any cluster's available rows there
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * sizes, least, available).sum() < budget:
            low = middle
        else:
            high = middle
    exact = np.clip(high * sizes, least, available)
    whole = np.floor(exact + 1e-9).astype(np.int64)  # 2.9999999999 is 3
    order = np.lexsort((np.arange(len(sizes)), -sizes, -(exact - whole)))
    for step in (1, -1):
        while (gap := budget - int(whole.sum())) * step > 0:
            able = [i for i in order[::step] if least[i] <= whole[i] + step <= available[i]]
            whole[able[: abs(gap)]] += step
    return whole


def gumbel(names: Sequence[str], seed: int) -> np.ndarray:
    """A standard Gumbel draw for each name, float64, a function of (seed, name) alone: the largest of logit + draw is a
    sample from the softmax of the logits, and the next ones continue it without replacement (arXiv 1903.06059)."""
    bits = np.array([int(digest(str(seed), name)[:13], 16) for name in names], np.float64)  # 52 of 128 bits
    draws: np.ndarray = -np.log(-np.log((bits + 0.5) / 2.0**52))
    return draws
